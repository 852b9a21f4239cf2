"""What a greeting tells of a client's data: under a promise nothing, whichever task it is."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.local_data import FolderShards
from atoll.client.site import Site
from atoll.data.dataset import Dataset
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.kit.kit import Budget
from atoll.learning.learner import Learner
from atoll.protocol.messages import Failure, Hello, Update, hello_to_json
from atoll.protocol.requests import EvaluateRequest, Request, TrainRequest
from atoll.server.job_checks import validate_for_deployment
from atoll.sim.population.population import Population
from atoll.tasks import NAME, NUMBER, TASKS, InfoField, ModuleTask, data_info, task_named
from atoll.tasks.data_info import check_info_stated, declared_fields
from tests.data.test_bad_data import png
from tests.support.small import believing
from tests.support.task_data import ready
from tests.support.task_jobs import TABLES, job_of

CANARY = "canary-9f3e"
"""Stands in the one record more, wherever a word can."""

CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.05}
DISTRIBUTED = {"where": "distributed"}
FEDERATION = {"clients": 4, "rounds": 2}
SILENT: dict[str, dict[str, Any]] = {
    "client": {"privacy": CLIENT},
    "client, distributed": {"privacy": CLIENT | DISTRIBUTED},
    "example": {"privacy": EXAMPLE},
    "example, distributed": {"privacy": EXAMPLE | DISTRIBUTED, "train": {"optimizer": "sgd"}},
    "both": {
        "privacy": {
            "unit": "both",
            "client": {k: v for k, v in CLIENT.items() if k != "unit"},
            "example": {k: v for k, v in EXAMPLE.items() if k != "unit"},
        }
    },
    "a secure sum": {"federation": FEDERATION | {"secure_aggregation": True}},
}
"""Under which a greeting tells nothing of the data."""

Odd = Callable[[dict[str, Any]], dict[str, Any]]
ODD: dict[str, Odd] = {
    "text-classification": lambda row: row | {"text": CANARY, "label": CANARY},
    "text-labels": lambda row: row | {"text": CANARY, "labels": [CANARY]},
    "text-regression": lambda row: row | {"text": CANARY, "number": 7e9},
    "image-classification": lambda row: row | {"label": CANARY},
    "image-text": lambda row: row | {"text": CANARY, "label": CANARY},
    "medical-imaging": lambda row: row | {"label": CANARY, "image": {"bytes": png(33, 33), "path": None}},
    "object-detection": lambda row: row | {"boxes": [[0.0, 0.0, 1.0, 1.0]] * 57, "classes": [CANARY] * 57},
    "segmentation": lambda row: row | {"mask": {"bytes": all_of_class(row, 200), "path": None}},
    "forecasting": lambda row: row | {"history": [7e9 for _ in row["history"]]},
    "survival": lambda row: row | {"time": 7e9, "event": not row["event"]},
    "recommendation": lambda row: row | {
        "user": CANARY, "items": [CANARY, *row["items"][1:]], "texts": [CANARY for _ in row["items"]],
    },
    "language-modeling": lambda row: {"messages": [{"role": "assistant", "content": CANARY * 20}]},
    "preference": lambda row: row | {"chosen": CANARY, "rejected": CANARY * 20},
    "multiple-choice": lambda row: row | {"choices": [CANARY, "b"], "answer": 0},
    "text-to-text": lambda row: row | {"source": CANARY, "target": CANARY * 20},
    "question-answering": lambda row: row | {"question": CANARY, "answer": CANARY * 20},
    "speech-recognition": lambda row: row | {"transcript": CANARY * 9},
    "token-classification": lambda row: row | {"tokens": [CANARY, "b"], "tags": [f"B-{CANARY}", "O"]},
    "intent": lambda row: row | {"text": "a b", "intent": CANARY, "slots": f"B-{CANARY} O"},
}  # fmt: skip
"""The record more, made of another one: a label, items, boxes, a class that nobody else has."""

GIVEN: dict[str, Callable[[Dataset], dict[str, Any]]] = {
    "recommendation": lambda rows: {"classes": sorted({item for items in rows["items"] for item in items})},
    "object-detection": lambda rows: {"classes": sorted({n for names in rows["classes"] for n in names})},
    "intent": lambda rows: {"classes": sorted(set(rows["intent"]))},
    "token-classification": lambda rows: {"classes": sorted({tag for tags in rows["tags"] for tag in tags})},
    "text-labels": lambda rows: {"classes": sorted({name for names in rows["labels"] for name in names})},
    "segmentation": lambda rows: {},
}
OPTIONS = {
    "object-detection": {"max_boxes": 8},
    "intent": {"tags": ("B-place",)},
    "speech-recognition": {"letters": "abo"},
}


def all_of_class(row: dict[str, Any], number: int) -> bytes:
    """A mask of the picture's size that is of one class."""
    import io

    from atoll.data.images import image_bytes

    out = io.BytesIO()
    size = Image.open(io.BytesIO(image_bytes(row["image"]))).size
    Image.fromarray(np.full(size[::-1], number, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Two data sets on disk, one with a record more, and a job that gives what a greeting may not tell."""

    job: Job
    plain: Path
    odd: Path

    def site(self, path: Path, **kind: Any) -> Site:
        return Site(
            FolderShards.of("here", [path]), **{"discreet": True, "secure_session": believing(), **kind}
        )

    def greetings(self, setting: Job, **kind: Any) -> list[Hello]:
        """That of the one data set, and that of the other."""
        return [self.site(path, **kind).hello(setting)[0] for path in (self.plain, self.odd)]


def rows_of(setting: Job, folder: Path) -> Dataset:
    """A few rows of the task's small job."""
    whole = Population.of(ready(setting, folder)).train
    keep = [name for name in whole.column_names if name not in ("test",)]
    rows = whole.select(range(8))[:]
    kinds = {name: whole.schema.field(name).type for name in keep}
    return Dataset(pa.table({name: pa.array(rows[name], kinds[name]) for name in keep}))


def with_one_more(rows: Dataset, odd: Odd) -> Dataset:
    return with_records(rows, [*(rows[number] for number in range(len(rows))), odd(rows[0])])


def with_records(rows: Dataset, records: Sequence[dict[str, Any]]) -> Dataset:
    """The records, in columns of the rows' types."""
    schema = rows.table.schema
    return Dataset(
        pa.table({n: pa.array([r[n] for r in records], schema.field(n).type) for n in schema.names})
    )


@pytest.fixture(scope="module", params=sorted(TABLES))
def neighbours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Neighbours:
    name, folder = request.param, tmp_path_factory.mktemp("neighbours")
    setting = job_of(name, "full")
    (folder / "made").mkdir()
    rows = rows_of(setting, folder / "made")
    task, paths = task_named(name), [folder / "plain", folder / "odd"]
    for path, part in zip(paths, (rows, with_one_more(rows, ODD[name])), strict=True):
        task.write(part, path, setting.data)
    by_label = "label" in rows.column_names and name not in GIVEN
    given = {"classes": sorted(set(rows["label"]))} if by_label else GIVEN.get(name, lambda _: {})(rows)
    data = {"source": str(paths[0])} | given
    options = dict(setting.task.options) | OPTIONS.get(name, {})
    return Neighbours(with_tables(setting, {"data": data, "task": {"options": options}}), *paths)


def with_tables(setting: Job, tables: dict[str, Any]) -> Job:
    table = json.loads(setting.canonical)
    for name, values in ({"federation": FEDERATION} | tables).items():
        table[name] = values if name == "privacy" else table[name] | values
    return Job.parse(table, origin="test")


@pytest.mark.parametrize("promise", SILENT)
def test_a_record_more_changes_no_byte_of_a_greeting(neighbours: Neighbours, promise: str) -> None:
    setting = with_tables(neighbours.job, SILENT[promise])
    one, other = neighbours.greetings(setting)
    assert one.refusal == "" and one.num_examples == 0
    assert hello_to_json(one) == hello_to_json(other)
    assert CANARY not in hello_to_json(other)


def test_a_record_more_changes_no_byte_at_a_site_with_a_budget(
    neighbours: Neighbours, tmp_path: Path
) -> None:
    setting = with_tables(neighbours.job, SILENT["example"])
    books = PrivacyLedgers(tmp_path, Budget(epsilon=8.0, delta=1e-5))
    one, other = neighbours.greetings(setting, ledgers=books, discreet=False)
    assert one.refusal == "" and hello_to_json(one) == hello_to_json(other)


def test_a_simulation_tells_no_more(neighbours: Neighbours) -> None:
    setting = with_tables(neighbours.job, SILENT["client"] | {"federation": {"clients": 2}})
    data = setting.data.model_copy(update={"source": str(neighbours.odd)})
    population = Population.of(setting.model_copy(update={"data": data}))
    roster = population.roster(setting)
    assert CANARY not in json.dumps(roster.data_info) and not roster.sizes.any()
    assert roster.sizes_description == "how many examples each has is not told"


def test_without_a_promise_a_greeting_is_what_it_was(neighbours: Neighbours) -> None:
    """The data's own facts, and how many examples there are: the job gives nothing here."""
    task = task_named(neighbours.job.task.name)
    table = json.loads(job_of(task.name, "full").canonical)
    table["data"] |= {"source": str(neighbours.plain), "classes": None}
    table["task"]["options"].pop("classes", None)
    setting = Job.parse(table, origin="test")
    [hello] = neighbours.site(neighbours.plain).hello(setting)
    table = task.read(neighbours.plain, setting.data, setting.task.options)
    facts = task.local_info(table.train, setting.data, setting.task.options)
    assert hello == Hello("here", facts, len(table.train), counts=hello.counts)
    assert hello.counts[: len(table.counts)] == [one.as_json for one in table.counts]


def test_each_field_of_a_greeting_is_declared(neighbours: Neighbours) -> None:
    """Of the job that gives everything, and of one that gives nothing."""
    task = task_named(neighbours.job.task.name)
    for setting in (neighbours.job, job_of(task.name, "full", data={"source": str(neighbours.plain)})):
        fields = declared_fields(task, setting)
        assert fields is not None
        rows = task.read(neighbours.plain, setting.data, setting.task.options).train
        facts = task.local_info(rows, setting.data, setting.task.options)
        assert set(facts) <= {field.name for field in fields}


@pytest.mark.parametrize("promise", SILENT)
def test_server_simulation_and_site_refuse_alike_what_the_job_has_not_given(
    neighbours: Neighbours, promise: str
) -> None:
    given = with_tables(neighbours.job, SILENT[promise])
    task = task_named(given.task.name)
    keys = [field.job_key for field in declared_fields(task, given) or () if field.concerns != "public"]
    for key in dict.fromkeys(keys):
        setting = without(given, key)
        said = rf"^{key.replace('.', '[.]')}: missing, expected "
        with pytest.raises(ConfigError, match=said):
            check_info_stated(setting, task)
        with pytest.raises(ConfigError, match=said) as refused:
            validate_for_deployment(setting)
        assert "\n" not in str(refused.value)
        [hello] = neighbours.site(neighbours.odd).hello(setting)
        assert hello == Hello("here", {}, 0, refusal=str(refused.value))
        request = EvaluateRequest(setting.canonical, setting.hash, 1, {}, {})
        [reply] = answers(neighbours.site(neighbours.odd), request)
        assert CANARY not in str(reply)


def answers(site: Site, request: Request) -> Sequence[Any]:
    return list(site.answer(request, ["here"]))


def without(setting: Job, key: str) -> Job:
    """The job, which doesn't give that."""
    *path, last = key.split(".")
    whole = json.loads(setting.canonical)
    inner = whole
    for part in path:
        inner = inner[part]
    inner.pop(last)
    return Job.parse(whole, origin="test")


def test_every_task_says_what_its_greetings_tell() -> None:
    assert set(ODD) == set(TASKS)
    for name in TASKS:
        assert declared_fields(task_named(name), job_of(name, "full")) is not None


DATA = job_of("object-detection", "full").data
"""Without names of columns."""


@pytest.mark.parametrize("name", TASKS)
def test_the_page_on_privacy_lists_what_is_declared(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 4]
    _, _, tells, gives, _ = row.split("|")
    setting = job_of(name, "full")
    if name == "recommendation":  # with texts that the network reads
        setting = with_tables(setting, {"backbone": {"options": {"text": "hf:any"}}})
    fields = [
        field for field in declared_fields(task_named(name), setting) or () if field.concerns != "public"
    ]
    assert re.findall("`(.*?)`", tells) == [field.name for field in fields]
    assert re.findall("`(.*?)`", gives) == list(dict.fromkeys(field.job_key for field in fields))
    assert fields or tells.strip() == "nothing"


# Records that don't fit

LABELS = {
    "some": ["p", "q", "p", CANARY],
    "the same": ["p", "q", "p"],
    "one": [CANARY, "q"],
    "none": [CANARY],
}


def pictures(folder: Path, labels: Sequence[str]) -> Path:
    images = [{"bytes": png(20 + number, 20), "path": None} for number in range(len(labels))]
    table = pa.table({"image": pa.array(images), "label": list(labels)})
    task_named("image-classification").write(Dataset(table), folder, DATA)
    return folder


def of_pictures(promise: str, tune: str) -> Job:
    backbone = {"name": "raw:pixels", "image_size": 8} if tune == "head" else {}
    tables: dict[str, Any] = {"data": {"source": "/data", "classes": ("p", "q")}, "backbone": backbone}
    return with_tables(job_of("image-classification", tune), tables | SILENT[promise])


def reply_of(site: Site, setting: Job, classes: Sequence[str] = ("p", "q")) -> Any:
    facts = {"classes": list(classes)}
    learner = Learner.of(setting, task_named(setting.task.name), facts)
    tensors = learner.initial()
    request = TrainRequest(setting.canonical, setting.hash, 1, facts, tensors, run="run")
    [reply] = site.answer(request, ["here"])
    return reply


@pytest.mark.parametrize("tune", ["head", "full"])
@pytest.mark.parametrize("promise", ["client", "example"])
def test_a_site_answers_alike_whichever_of_its_records_fit(promise: str, tune: str, tmp_path: Path) -> None:
    """Also where none does: else a job could ask whether anybody here has a name."""
    setting, told_by = of_pictures(promise, tune), {}
    for name, labels in LABELS.items():
        shards = FolderShards.of("here", [pictures(tmp_path / name, labels)])
        books = PrivacyLedgers(tmp_path / f"{name} books")
        site = Site(shards, discreet=True, ledgers=books, secure_session=believing())
        [hello], reply = site.hello(setting), reply_of(site, setting)
        assert isinstance(reply, Update), reply
        shapes = {key: (value.shape, value.dtype) for key, value in reply.delta.items()}
        told_by[name] = (hello_to_json(hello), shapes, sorted(reply.states))
        if promise == "example":
            assert reply.num_examples == 1
            assert (float(reply.states["train_loss.sum"]), float(reply.states["train_loss.count"])) == (0, 0)
            assert all(bool(value.any()) for value in reply.delta.values())  # it is noise
    assert len({str(said) for said in told_by.values()}) == 1


def test_a_server_cannot_ask_with_other_facts_than_the_jobs(tmp_path: Path) -> None:
    """A site whose data has what they lack would fail, and so tell that it has it."""
    setting = of_pictures("client", "head")
    for name, labels in {"with": ["p", "q"], "without": ["p", "p"]}.items():
        site = Site(
            FolderShards.of("here", [pictures(tmp_path / name, labels)]),
            discreet=True,
            secure_session=believing(),
        )
        reply = reply_of(site, setting, classes=("p", "other"))
        assert reply == Failure("here", "the facts of its request are not those that its job gives")


def test_a_record_that_does_not_fit_moves_nothing(tmp_path: Path) -> None:
    """A client's update is that of its other records, bit for bit."""
    setting, deltas = of_pictures("client", "head"), []
    for name in ("some", "the same"):
        shards = FolderShards.of("here", [pictures(tmp_path / name, LABELS[name])])
        deltas.append(reply_of(Site(shards, discreet=True, secure_session=believing()), setting).delta)
    assert all(torch.equal(deltas[0][key], deltas[1][key]) for key in deltas[0])


def test_a_site_that_refuses_for_one_record_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import atoll.client.shard_cache

    monkeypatch.setattr(atoll.client.shard_cache, "fitting_rows", lambda job, task, rows, **more: rows)
    setting = of_pictures("client", "head")
    replies = []
    for name in ("some", "the same"):
        shards = FolderShards.of("here", [pictures(tmp_path / name, LABELS[name])])
        replies.append(reply_of(Site(shards, discreet=True, secure_session=believing()), setting))
    assert [type(reply) for reply in replies] == [Failure, Update]


# Columns that hold what nobody may know


def rows_of_people(folder: Path) -> Path:
    folder.mkdir()
    lines = [{"text": f"text {i}", "label": "ab"[i % 2], "ssn": f"{CANARY}-{i}"} for i in range(6)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize("label", [None, "ssn"])
def test_a_site_with_a_budget_tells_no_values_of_a_column(label: str | None, tmp_path: Path) -> None:
    data = {"source": "bbc-news"} | ({} if label is None else {"label": label})
    setting = job_of("text-classification", "full", data=data, privacy=EXAMPLE)
    books = PrivacyLedgers(tmp_path / "books", Budget(epsilon=8.0, delta=1e-5))
    site = Site(FolderShards.of("here", [rows_of_people(tmp_path / "rows")]), ledgers=books)
    [hello] = site.hello(setting)
    assert hello.data_info == {} and hello.num_examples == 0
    assert hello.refusal.startswith("data.classes: missing, expected the list of classes")


# Catalogues


def test_the_texts_of_items_are_told_by_the_job_or_not_at_all(tmp_path: Path) -> None:
    task = task_named("recommendation")
    rows = Dataset(pa.table({"user": ["u"], "items": [["a", "b"]], "texts": [[CANARY, CANARY]]}))
    data = {"source": "/data", "classes": ("a", "b", "c")}
    plain = with_tables(job_of("recommendation", "full"), {"data": data})
    assert task.local_info(rows, plain.data, plain.task.options)["texts"] == [CANARY, CANARY, ""]
    private = with_tables(plain, SILENT["client"])
    assert data_info.greeting_info(private, task, rows)["texts"] == ["", "", ""]
    reading = with_tables(private, {"backbone": {"options": {"text": "hf:any"}}})
    with pytest.raises(ConfigError, match=r"^task\.options\.texts: missing, expected the items' texts"):
        check_info_stated(reading, task)
    given = with_tables(reading, {"task": {"options": {"texts": ["x", "y", "z"]}}})
    facts = data_info.greeting_info(given, task, rows)
    assert facts == {"items": ["a", "b", "c"], "texts": ["x", "y", "z"], "pinned": True}
    assert task.merge_info([facts, facts]) == {"items": ["a", "b", "c"], "texts": ["x", "y", "z"]}
    few = with_tables(reading, {"task": {"options": {"texts": ["x"]}}})
    with pytest.raises(ConfigError, match=r"task\.options\.texts: 1 texts for 3 items"):
        task.check(few)


# Extensions


class Untold(ModuleTask):
    """A task of somebody's own that says nothing of what it tells."""

    name = "untold"
    columns: ClassVar[Any] = {"size": NUMBER, "town": NAME}

    def local_info(self, dataset: Any, data: Any, options: Any) -> dict[str, Any]:
        return {"towns": sorted(set(dataset["town"]))}


class Telling(Untold):
    name = "telling"
    info_fields = (InfoField("towns", "example", "data.classes", "the list of towns"),)

    def local_info(self, dataset: Any, data: Any, options: Any) -> dict[str, Any]:
        return {"towns": list(data.classes or sorted(set(dataset["town"])))}


class Houses(ModuleTask):
    name = "houses"
    columns: ClassVar[Any] = {"size": NUMBER}


class Kinds(Houses):
    label = "kind"


def private(**data: Any) -> Job:
    return job_of("forecasting", "full", data={"source": "/data/houses"} | data, privacy=CLIENT)


def test_an_extension_that_declares_nothing_is_refused_under_a_promise() -> None:
    with pytest.raises(ConfigError, match=r"task\.name: untold does not declare what its greetings tell"):
        check_info_stated(private(), Untold())
    check_info_stated(job_of("forecasting", "full", data={"source": "/data/houses"}), Untold())


def test_an_extension_gives_what_it_declares() -> None:
    with pytest.raises(ConfigError, match=r"data\.classes: missing, expected the list of towns"):
        check_info_stated(private(), Telling())
    check_info_stated(private(classes=["north", "south"]), Telling())
    check_info_stated(private(), Houses())
    with pytest.raises(ConfigError, match=r"data\.classes: missing, expected the list of classes"):
        check_info_stated(private(), Kinds())


def test_a_declared_field_that_no_key_gives_is_refused() -> None:
    class Odd(Untold):
        info_fields = (InfoField("towns", "client"),)

        def local_info(self, dataset: Any, data: Any, options: Any) -> dict[str, Any]:
            return {"towns": sorted(set(dataset["town"]))}

    with pytest.raises(ConfigError, match="no key of the job can give it"):
        check_info_stated(private(classes=["north"]), Odd())


# Sabotage


def everything_is_public(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(data_info, "_is_public", lambda job, at_a_site: True)


def sizes_are_told(patch: pytest.MonkeyPatch) -> None:
    import atoll.client.site

    patch.setattr(atoll.client.site, "is_silent", lambda job, **more: False)


def rows_that_do_not_fit_are_refused(patch: pytest.MonkeyPatch) -> None:
    """And rows are looked at for the greeting."""
    patch.setattr(
        data_info,
        "greeting_info",
        lambda job, task, rows, **_: task.local_info(rows, job.data, job.task.options),
    )
    import atoll.client.site

    patch.setattr(atoll.client.site, "greeting_info", data_info.greeting_info)


def the_site_does_not_look(patch: pytest.MonkeyPatch) -> None:
    import atoll.client.site

    patch.setattr(atoll.client.site, "check_info_stated", lambda job, task, **more: None)
    patch.setattr(
        atoll.client.site, "greeting_info",
        lambda job, task, rows, **_: task.local_info(rows, job.data, job.task.options),
    )  # fmt: skip


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Neighbours:
    """Pictures that one box, or 57, are in."""
    folder, paths = tmp_path_factory.mktemp("boxes"), []
    for name, count in (("plain", 1), ("odd", 57)):
        table = pa.table(
            {
                "image": pa.array([{"bytes": png(20 + i, 20), "path": None} for i in range(3)]),
                "boxes": pa.array([[[0.0, 0.0, 1.0, 1.0]] * (count if i else 1) for i in range(3)]),
                "classes": pa.array([["a"] * (count if i else 1) for i in range(3)]),
            }
        )
        task_named("object-detection").write(Dataset(table), folder / name, DATA)
        paths.append(folder / name)
    data = {"source": str(paths[0]), "classes": ("a", "b")}
    given = {"data": data, "task": {"options": {"max_boxes": 8}}}
    return Neighbours(with_tables(job_of("object-detection", "full"), given), *paths)


@pytest.mark.parametrize(
    "plant", [None, sizes_are_told, rows_that_do_not_fit_are_refused],
    ids=lambda plant: getattr(plant, "__name__", "as it is"),
)  # fmt: skip
def test_a_planted_leak_is_found(
    plant: Callable[[pytest.MonkeyPatch], None] | None, neighbours: Neighbours,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if plant is not None:
        plant(monkeypatch)
    setting = with_tables(neighbours.job, SILENT["client"])
    one, other = (hello_to_json(hello) for hello in neighbours.greetings(setting))
    tells = plant is sizes_are_told or (plant is not None and neighbours.job.task.name in REFUSING)
    assert (one != other) == tells


REFUSING = (
    "text-classification", "image-classification", "image-text", "medical-imaging", "object-detection",
    "segmentation", "intent", "token-classification", "text-labels",
)  # fmt: skip
"""Tasks whose `local_info` refuses a record that the job's names don't have."""


@pytest.mark.parametrize("plant", [the_site_does_not_look, everything_is_public])
def test_a_site_that_does_not_look_tells_the_boxes(
    plant: Callable[[pytest.MonkeyPatch], None], boxes: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = without(with_tables(boxes.job, SILENT["client"]), "task.options.max_boxes")
    assert {hello.refusal[:22] for hello in boxes.greetings(setting)} == {"task.options.max_boxes"}
    plant(monkeypatch)
    assert [hello.data_info["most"] for hello in boxes.greetings(setting)] == [1, 57]
