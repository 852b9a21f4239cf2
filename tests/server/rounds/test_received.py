"""A site that sends what nobody asked for: it is set aside by name, and the run goes on without it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from atoll.errors import DataError
from atoll.job.job import Job
from atoll.protocol.flower_content import bodies_of, packed, packed_greetings, unpacked, unpacked_greetings
from atoll.protocol.messages import MOST_CHARACTERS, cleaned
from atoll.protocol.tensors import from_bytes, to_bytes
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks import task_named
from atoll.tasks.info_checks import check_info
from tests.support.memory_grid import MemoryGrid, unchanged

HONEST = ("client-0000", "client-0001", "client-0002")
HOSTILE = "client-0003"
VICTIM = HONEST[0]

Hostile = Callable[[RecordDict], RecordDict | str]


def setting(clients: int = 4, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "received", "seed": 5,
        "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "federation": {"clients": clients, "rounds": 1, "quorum": 0.05},
        "evaluate": {"baselines": []},
    }  # fmt: skip
    return Job.parse(
        table | {key: table.get(key, {}) | value for key, value in tables.items()}, origin="test"
    )


@dataclass
class Crowd:
    """Three honest sites, and one for each way to be hostile; what the honest ones make of it alone."""

    grid: MemoryGrid
    job: Job
    alone: RunResult

    @classmethod
    def of(cls, folder: Path, ways: int) -> Crowd:
        job = setting(len(HONEST) + ways)
        grid = MemoryGrid.of(job, folder)
        grid.change = lambda kind, site, reply: reply if site in HONEST else "it went away"
        return cls(grid, job, grid.run(job, folder / "alone"))

    def run(self, kind: str, ways: Mapping[str, Hostile], out: Path) -> RunResult:
        """The result where each hostile site does its own to such replies, and is honest otherwise."""
        hostile = dict(zip(list(self.grid.sites)[len(HONEST) :], ways.values(), strict=True))

        def change(asked: str, site: str, reply: RecordDict) -> RecordDict | str:
            return hostile[site](reply) if asked == kind and site in hostile else reply

        self.grid.change = change
        return self.grid.run(self.job, out)

    def by_way(self, ways: Mapping[str, Hostile], found: Mapping[str, Any]) -> dict[str, Any]:
        """What is found of each hostile site, by what it did."""
        return {way: found.get(site) for way, site in zip(ways, list(self.grid.sites)[3:], strict=True)}


def with_head(reply: RecordDict, **fields: Any) -> RecordDict:
    """The reply with other fields in its head; None takes a field out."""
    heads, bodies = unpacked(reply)
    ((name, head),) = heads.items()
    told = {k: v for k, v in (json.loads(head) | fields).items() if v is not None}
    return packed({name: json.dumps(told)}, bodies_of(bodies))


def with_head_text(text: str) -> Callable[[RecordDict], RecordDict]:
    return lambda reply: packed(dict.fromkeys(unpacked(reply)[0], text), bodies_of(unpacked(reply)[1]))


def with_body(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Any:
    def changed(reply: RecordDict) -> RecordDict:
        heads, bodies = unpacked(reply)
        whole = {name: to_bytes(change(from_bytes(body))) for name, body in bodies.items()}
        return packed(heads, bodies_of(whole))

    return changed


def with_raw_body(blob: bytes) -> Any:
    return lambda reply: packed(unpacked(reply)[0], bodies_of(dict.fromkeys(unpacked(reply)[1], blob)))


def with_header(header: str, data: bytes = b"") -> Any:
    """Safetensors with that header."""
    return with_raw_body(len(header).to_bytes(8, "little") + header.encode() + data)


def filled(value: float) -> Any:
    """All numbers replaced that can be: counts are whole."""
    return with_body(
        lambda tensors: {
            name: torch.full_like(t, value) if t.is_floating_point() else t for name, t in tensors.items()
        }
    )


ANY_REPLY: dict[str, Callable[[RecordDict], RecordDict]] = {
    "empty": lambda reply: RecordDict(),
    "no body": lambda reply: packed(unpacked(reply)[0], bodies_of({})),
    "no head": lambda reply: packed({}, bodies_of(unpacked(reply)[1])),
    "another record in its place": lambda reply: RecordDict({"head": ArrayRecord()}),
    "numbers in its place": lambda reply: RecordDict({"head": ConfigRecord({"text/client-0003": 7})}),
    "no JSON": with_head_text("not JSON"),
    "a list": with_head_text("[]"),
    "brackets": with_head_text("[" * 100_000),
    "a number of 10,000 digits": with_head_text('{"version": ' + "9" * 10_000 + "}"),
    "version 9": lambda reply: with_head(reply, version=9),
    "a kind of its own": lambda reply: with_head(reply, kind="Gift"),
    "a kind that is a list": lambda reply: with_head(reply, kind=["Update"]),
    "another kind": lambda reply: with_head(reply, kind="SecureMessage", num_examples=None),
    "a field more": lambda reply: with_head(reply, more=1),
    "a field less": lambda reply: with_head(reply, round=None),
    "examples in words": lambda reply: with_head(reply, num_examples="many"),
    "examples as a fraction": lambda reply: with_head(reply, num_examples=1e30),
    "a thousand million examples": lambda reply: with_head(reply, num_examples=10**9),
    "examples below zero": lambda reply: with_head(reply, num_examples=-5),
    "another round": lambda reply: with_head(reply, round=7),
    "another's name": lambda reply: with_head(reply, client=VICTIM),
    "no safetensors": with_raw_body(b"\xff" * 64),
    "a header of 2^60 bytes": with_raw_body((2**60).to_bytes(8, "little") + b"{}"),
    "tensors that overlap": with_raw_body(
        (90).to_bytes(8, "little")
        + json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}).encode()[:90]
    ),
    "no tensors": with_body(lambda tensors: {}),
    "a tensor more": with_body(lambda tensors: tensors | {"states/x": torch.zeros(1)}),
    "another shape": with_body(lambda tensors: {n: t.reshape(-1)[:1] for n, t in tensors.items()}),
    "whole numbers": with_body(lambda tensors: {n: t.to(torch.int32) for n, t in tensors.items()}),
    "one number each": with_body(lambda tensors: {n: t.reshape(-1)[0] for n, t in tensors.items()}),
    "half as precise": with_body(lambda tensors: {n: t.half() for n, t in tensors.items()}),
    "nothing that is a number": filled(torch.nan),
    "infinite": filled(torch.inf),
    "4 TB claimed and no byte of it": with_header(
        '{"delta/w": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
    ),
    "dimensions below zero": with_header(
        '{"delta/w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', bytes(4)
    ),
    "objects": with_header('{"delta/w": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}', bytes(8)),
    "a name twice": with_header(
        '{"delta/w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        ' "delta/w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        bytes(8),
    ),
    "4 MB more": with_body(lambda tensors: tensors | {"states/x": torch.zeros(1_000_000)}),
    "2,000 tensors more": with_body(
        lambda tensors: tensors | {f"states/x{number}": torch.zeros(()) for number in range(2_000)}
    ),
    "examples that are no number": lambda reply: with_head(reply, num_examples=torch.nan),
    "a million million examples": lambda reply: with_head(reply, num_examples=10**12),
}  # fmt: skip


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    return Crowd.of(tmp_path_factory.mktemp("crowd"), len(ANY_REPLY))


def test_a_malformed_update_sets_its_client_aside_and_no_other(crowd: Crowd, tmp_path: Path) -> None:
    result = crowd.run("train", ANY_REPLY, tmp_path / "run")
    assert result.model_sha256 == crowd.alone.model_sha256
    (line,) = result.rounds
    for way, reason in crowd.by_way(ANY_REPLY, line["set_aside"]).items():
        assert reason and len(reason) <= 2 * MOST_CHARACTERS, way
        assert reason != "no reply before the deadline", way
    assert not line["set_aside"].keys() & set(HONEST)


def test_a_malformed_measurement_sets_its_client_aside_and_no_other(
    crowd: Crowd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = crowd.run("evaluate", ANY_REPLY, tmp_path / "run")
    assert set(result.final["clients"]) == set(HONEST)
    for way, said in crowd.by_way(
        ANY_REPLY, {site: f"set aside {site}:" for site in crowd.grid.sites}
    ).items():
        assert said in caplog.text, way
    assert result.rounds[0]["metrics"].keys() == crowd.alone.rounds[0]["metrics"].keys()
    assert all(value is not None for value in result.rounds[0]["metrics"].values())


def test_an_update_of_an_enormous_norm_sets_its_client_aside(few: Crowd, tmp_path: Path) -> None:
    enormous = with_body(
        lambda tensors: {
            name: torch.full_like(t, 1e30) if name.startswith("delta/") else t for name, t in tensors.items()
        }
    )
    result = few.run("train", {"1e30": enormous}, tmp_path / "run")
    assert result.model_sha256 == few.alone.model_sha256
    assert "norm is" in result.rounds[0]["set_aside"][HOSTILE]


def greeting(**fields: Any) -> Callable[[RecordDict], RecordDict]:
    def changed(reply: RecordDict) -> RecordDict:
        (text,) = unpacked_greetings(reply)
        return packed_greetings([json.dumps(json.loads(text) | fields)])

    return changed


def facts(**info: Any) -> Callable[[RecordDict], RecordDict]:
    return greeting(data_info={"classes": [str(digit) for digit in range(10)]} | info)


GREETINGS: dict[str, Callable[[RecordDict], RecordDict]] = {
    "empty": lambda reply: RecordDict(),
    "another record in its place": lambda reply: RecordDict({"hellos": ArrayRecord()}),
    "no list": lambda reply: RecordDict({"hellos": ConfigRecord({"json": "{}"})}),
    "numbers": lambda reply: RecordDict({"hellos": ConfigRecord({"json": [1, 2]})}),
    "no JSON": lambda reply: packed_greetings(["not JSON"]),
    "brackets": lambda reply: packed_greetings(["[" * 100_000]),
    "nine million characters": lambda reply: packed_greetings([" " * 9_000_000]),
    "10,001 clients": lambda reply: packed_greetings(unpacked_greetings(reply) * 10_001),
    "version 9": greeting(version=9),
    "facts that are a list": greeting(data_info=[]),
    "a field more": greeting(more=1),
    "examples in words": greeting(num_examples="many"),
    "examples below zero": greeting(num_examples=-1),
    "10^30 examples": greeting(num_examples=10**30),
    "a name with a newline": greeting(client="client-0003\nround 9: done"),
    "no name": greeting(client=""),
    "100,000 classes": facts(classes=[str(number) for number in range(100_000)]),
    "a class of 100,000 letters": facts(classes=["a" * 100_000, "b"]),
    "the same class twice": facts(classes=["a", "a"]),
    "classes that are numbers": facts(classes=[1, 2]),
    "classes that are one text": facts(classes="abc"),
    "no classes": greeting(data_info={}),
    "classes that it calls the job's": facts(classes=["cat", "dog"], pinned=True),
    "what the task doesn't tell": facts(secret="Ann Smith"),
}


def test_a_malformed_greeting_leaves_its_site_out_and_no_other(tmp_path: Path) -> None:
    crowd = Crowd.of(tmp_path, len(GREETINGS))
    result = crowd.run("query", GREETINGS, tmp_path / "run")
    assert result.model_sha256 == crowd.alone.model_sha256
    assert set(result.final["clients"]) == set(HONEST)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    return Crowd.of(tmp_path_factory.mktemp("few"), 1)


def test_a_site_cannot_answer_for_another(
    few: Crowd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers first, with the honest site's name in its message: what it sent is not looked at."""
    few.grid.change = unchanged
    expected = few.grid.run(few.job, tmp_path / "expected").model_sha256

    def for_both(kind: str, site: str, reply: RecordDict) -> RecordDict:
        if kind != "train" or site != HOSTILE:
            return reply
        heads, bodies = unpacked(reply)
        other = json.dumps(json.loads(heads[HOSTILE]) | {"client": VICTIM})
        return packed(heads | {VICTIM: other}, bodies_of(bodies | {VICTIM: bodies[HOSTILE]}))

    few.grid.change = for_both
    result = few.grid.run(few.job, tmp_path / "run")
    assert result.model_sha256 == expected
    assert all(line["set_aside"] == {} for line in result.rounds)
    assert f"a reply for {VICTIM}, which its site was not asked for" in caplog.text


@pytest.mark.parametrize("is_there", [True, False])
def test_a_site_cannot_take_the_name_of_another_whether_that_is_there_or_not(
    few: Crowd, is_there: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The roster says whose client it is; without that the lower node id had it."""
    others = setting(3, federation={"clients": 3 if is_there else 2, "wait": 5})
    order = (
        [HOSTILE, *HONEST] if is_there else [HOSTILE, *HONEST[1:]]
    )  # the hostile one's node id is the lowest
    grid = MemoryGrid({name: few.grid.sites[name] for name in order}, few.grid.roster)
    grid.change = lambda kind, site, reply: (
        greeting(client=VICTIM)(reply) if (kind, site) == ("query", HOSTILE) else reply
    )
    result = grid.run(others, tmp_path / "run")
    assert set(result.final["clients"]) == set(order[1:])
    assert f"node 1 calls itself {VICTIM}, which another one is: left out" in caplog.text


FORGED = "no\n\x1b[2Jround 9   accuracy 1.000" + "x" * 20_000_000


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
@pytest.mark.parametrize("form", ["error", "reply"])
def test_a_reason_of_20_megabytes_is_one_short_line_without_control_characters(
    kind: str, form: str, few: Crowd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hostile(asked: str, site: str, reply: RecordDict) -> RecordDict | str:
        if asked != kind or site != HOSTILE:
            return reply
        if form == "error":
            return FORGED
        if kind == "query":
            return greeting(refusal=FORGED[:8_000_000])(reply)
        failure = {"kind": "Failure", "version": 3, "client": HOSTILE, "reason": FORGED}
        return packed({HOSTILE: json.dumps(failure)}, bodies_of({HOSTILE: to_bytes({})}))

    few.grid.change = hostile
    with caplog.at_level(logging.INFO):
        few.grid.run(few.job, tmp_path / "run")
    assert "no �[2Jround 9" in caplog.text
    assert max(map(len, caplog.messages)) < 1_500
    for path in (tmp_path / "run").rglob("*.json*"):
        text = path.read_text()
        assert len(text) < 100_000 and "\\u001b" not in text and "\x1b" not in text


def test_text_from_outside_is_cut_and_cleaned() -> None:
    assert cleaned("a\r\nb\tc\u202e\u2028d\x00") == "a b c� d�"
    assert cleaned("ä" * 500) == "ä" * 500
    assert cleaned("ä" * 501) == "ä" * 500 + "… (501 characters)"


def test_a_number_of_bool_is_no_flag_and_a_task_that_declares_nothing_is_tried() -> None:
    detection = task_named("object-detection")
    job = setting(task={"name": "object-detection"})
    check_info(detection, job, {"classes": ["a"], "most": 3})
    for most in (True, 3.0, 10_001, -2, None):
        with pytest.raises(DataError, match="most: expected a whole number"):
            check_info(detection, job, {"classes": ["a"], "most": most})

    class Undeclared(type(detection)):  # type: ignore[misc]
        def local_info(self, *arguments: Any) -> dict[str, Any]:
            return {}

    check_info(Undeclared(), job, {"classes": ["a"], "most": 3})
    with pytest.raises(DataError, match="wrong form"):
        check_info(Undeclared(), job, {"classes": 3})


def test_a_name_that_the_job_gives_must_be_the_jobs() -> None:
    task, job = task_named("text-classification"), setting(data={"classes": ["a", "b"]})
    check_info(task, job, {"classes": ["a", "b"], "pinned": True})
    for info in ({"classes": ["b", "a"], "pinned": True}, {"classes": ["a", "b"]}):
        with pytest.raises(DataError, match=r"data\.classes"):
            check_info(task, job, info)


def test_an_error_of_flowers_is_named(few: Crowd, tmp_path: Path) -> None:
    result = few.run("train", {"an error": lambda reply: "disk\nfull"}, tmp_path / "run")
    assert result.model_sha256 == few.alone.model_sha256
    assert result.rounds[0]["set_aside"] == {HOSTILE: "disk full"}


def of_stage(part: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Hostile:
    """Changes a site's message of the stage that sends such a part, and no other."""

    def changed(reply: RecordDict) -> RecordDict:
        _, bodies = unpacked(reply)
        at_stage = any(f"content/{part}" in from_bytes(body) for body in bodies.values())
        return with_body(change)(reply) if at_stage else reply  # type: ignore[no-any-return]

    return changed


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {name: change(t) if t.dim() else t for name, t in tensors.items()}


BAD_FORMS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "nothing": lambda tensors: {},
    "a byte less": each(lambda t: t[:-1]),
    "other numbers": each(lambda t: t.to(torch.float64)),
    "one number": each(lambda t: t[0]),
    "two dimensions": each(lambda t: t.unsqueeze(0)),
}
SECURE: dict[str, Hostile] = {
    **{
        f"{stage}: {form}": of_stage(part, change)
        for stage, part in {"keys": "keys", "shares": "client-0000", "vector": "vector"}.items()
        for form, change in BAD_FORMS.items()
    },
    "keys that are zero": of_stage("keys", each(torch.zeros_like)),
    "keys without a signature": of_stage("keys", each(lambda t: t[:96])),
    "a share for nobody": of_stage(
        "client-0000", lambda tensors: tensors | {"content/nobody": torch.zeros(148).byte()}
    ),
    "no signature of the list": of_stage("signature", lambda tensors: {}),
    "no rounds at all": of_stage(
        "vector", lambda tensors: tensors | {"content/privacy.rounds": torch.full((3,), torch.nan)}
    ),
}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    """Six sites in a secure sum, of which five must stay."""
    digits = {"classes": [str(digit) for digit in range(10)]}
    job = setting(6, data=digits, federation={"secure_aggregation": True, "clients": 6})
    folder = tmp_path_factory.mktemp("sealed")
    grid = MemoryGrid.of(job, folder)
    return Crowd(grid, job, grid.run(job, folder / "alone"))


def test_a_secure_sum_has_the_bits_of_the_simulation(sealed: Crowd, tmp_path: Path) -> None:
    expected = simulate(sealed.job, tmp_path / "run", on_event=ignore_events, report=False)
    assert sealed.alone.model_sha256 == expected.model_sha256
    assert sealed.alone.rounds[0]["set_aside"] == {}


@pytest.mark.parametrize("way", SECURE)
def test_garbage_in_a_secure_sum_sets_aside_who_sent_it_and_no_other(
    sealed: Crowd, way: str, tmp_path: Path
) -> None:
    def change(asked: str, site: str, reply: RecordDict) -> RecordDict | str:
        return SECURE[way](reply) if (asked, site) == ("train", HOSTILE) else reply

    sealed.grid.change = change
    result = sealed.grid.run(sealed.job, tmp_path / "run")
    (line,) = result.rounds
    expected = set() if way == "no rounds at all" else {HOSTILE}
    assert line["set_aside"].keys() == expected, line["set_aside"]
    assert line["set_aside"].get(HOSTILE) != "no reply before the deadline"
