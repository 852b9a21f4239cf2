"""A run whose messages are signed: forged and replayed ones set their client aside, and the bits stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict

import atoll.client.app as client_app
from atoll.job.job import Job
from atoll.kit.signed_replies import Exchange
from atoll.protocol.flower_content import (
    add_seal,
    bodies_of,
    packed,
    packed_greetings,
    seal_of,
    unpacked,
    unpacked_greetings,
)
from atoll.protocol.messages import Measurement
from atoll.protocol.requests import StatisticsRequest, encode_request
from atoll.report.run_result import RunResult
from tests.server.rounds.test_received import setting
from tests.support.memory_grid import MemoryGrid, in_a_server_app, unchanged

HOSTILE, VICTIM = "client-0003", "client-0000"
ROUNDS = {"rounds": 2}


@dataclass
class Played:
    """Four sites that sign, and what becomes of three of them alone."""

    grid: MemoryGrid
    job: Job
    alone: RunResult
    earlier: list[RecordDict] = field(default_factory=list)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder, job = tmp_path_factory.mktemp("signed"), setting(4, federation=ROUNDS)
    grid = MemoryGrid.of(job, folder, signed=True)
    grid.change = lambda kind, site, reply: "it went away" if site == HOSTILE else reply
    return Played(grid, job, grid.run(job, folder / "alone"))


def test_signed_and_unsigned_runs_end_in_the_same_bits(played: Played, tmp_path: Path) -> None:
    played.grid.change = unchanged
    signed = played.grid.run(played.job, tmp_path / "signed")
    plain = MemoryGrid(played.grid.sites, played.grid.roster).run(played.job, tmp_path / "plain")
    assert signed.model_sha256 == plain.model_sha256 != played.alone.model_sha256
    assert all(line["set_aside"] == {} for line in signed.rounds)


def unsigned(reply: RecordDict) -> RecordDict:
    return packed(unpacked(reply)[0], bodies_of(unpacked(reply)[1]))


def sealed_again(played: Played, reply: RecordDict, **claims: Any) -> RecordDict:
    """The same content, signed by the hostile site's key for another exchange."""
    seal, signer = seal_of(reply), played.grid.sites[HOSTILE].signer
    assert seal is not None and signer is not None
    exchange = replace(Exchange(seal.run, seal.round, seal.nonce), **claims)
    heads, bodies = unpacked(reply)
    content = unsigned(reply)
    add_seal(content, signer.seal(exchange, {name: (heads[name], bodies[name]) for name in heads}))
    return content


def by_another_site(played: Played, reply: RecordDict) -> RecordDict:
    seal, signer = seal_of(reply), played.grid.sites[VICTIM].signer
    assert seal is not None and signer is not None
    heads, bodies = unpacked(reply)
    content, exchange = unsigned(reply), Exchange(seal.run, seal.round, seal.nonce)
    add_seal(content, signer.seal(exchange, {name: (heads[name], bodies[name]) for name in heads}))
    return content


def with_other_body(played: Played, reply: RecordDict) -> RecordDict:
    seal = seal_of(reply)
    assert seal is not None
    heads, bodies = unpacked(reply)
    content = packed(heads, bodies_of({name: body[:-1] + b"\1" for name, body in bodies.items()}))
    add_seal(content, seal)
    return content


def made_for_another_run(played: Played, reply: RecordDict) -> RecordDict:
    """What says that it was made for a run before, signed by its site as its answer to this request."""
    seal, (heads, bodies) = seal_of(reply), unpacked(reply)
    assert seal is not None
    stale = {name: json.dumps(json.loads(head) | {"run": "x"}) for name, head in heads.items()}
    content = packed(stale, bodies_of(bodies))
    add_seal(content, seal)
    return sealed_again(played, content)


def sent_before(played: Played, reply: RecordDict) -> RecordDict:
    """The first update of all, again and again."""
    played.earlier.append(reply)
    return played.earlier[0]


WAYS: dict[str, tuple[Callable[[Played, RecordDict], RecordDict], str]] = {
    "unsigned": (lambda played, reply: unsigned(reply), "has no signature of its site"),
    "another run": (lambda p, r: sealed_again(p, r, run="x"), "answers a request of another run"),
    "another round": (lambda p, r: sealed_again(p, r, round=7), "answers a request of round 7"),
    "another request": (lambda p, r: sealed_again(p, r, nonce="x"), "answers another request of this round"),
    "an update of another run": (made_for_another_run, "its reply was made for another run"),
    "another site's key": (by_another_site, "is not what its site has signed"),
    "another body": (with_other_body, "is not what its site has signed"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_signed_for_the_request_sets_its_client_aside_with_a_reason(
    way: str, played: Played, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forge, reason = WAYS[way]

    def change(kind: str, site: str, reply: RecordDict) -> RecordDict:
        return forge(played, reply) if kind == "train" and site == HOSTILE else reply

    played.grid.change = change
    result = played.grid.run(played.job, tmp_path / "run")
    assert result.model_sha256 == played.alone.model_sha256
    for line in result.rounds:
        assert reason in line["set_aside"][HOSTILE] and len(line["set_aside"]) == 1
    assert f"set aside {HOSTILE}" in caplog.text and reason in caplog.text


def test_an_update_that_is_sent_again_in_a_later_round_is_refused(played: Played, tmp_path: Path) -> None:
    played.earlier.clear()
    played.grid.change = lambda kind, site, reply: (
        sent_before(played, reply) if (kind, site) == ("train", HOSTILE) else reply
    )
    first, second = played.grid.run(played.job, tmp_path / "run").rounds
    assert first["set_aside"] == {}
    assert second["set_aside"] == {HOSTILE: "its message answers a request of round 1, expected 2"}


@pytest.mark.parametrize("name", [HOSTILE, VICTIM])
def test_a_greeting_that_its_site_has_not_signed_leaves_it_out(
    name: str, played: Played, tmp_path: Path
) -> None:
    def forged(kind: str, site: str, reply: RecordDict) -> RecordDict:
        if (kind, site) != ("query", HOSTILE):
            return reply
        (text,) = unpacked_greetings(reply)
        seal = seal_of(reply)
        assert seal is not None
        content = packed_greetings([json.dumps(json.loads(text) | {"client": name, "num_examples": 1})])
        add_seal(content, replace(seal, signatures={name: seal.signatures[HOSTILE]}))
        return content

    played.grid.change = forged
    three = setting(3, federation=ROUNDS)
    result = played.grid.run(three, tmp_path / "run")
    assert set(result.final["clients"]) == set(played.grid.sites) - {HOSTILE}


def test_a_request_that_comes_again_with_another_number_is_signed_anew_and_not_worked_on_twice(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a server that is started again gets the answers that its last process missed."""
    site, job = played.grid.sites[VICTIM], played.job
    worked: list[Any] = []
    measured = [Measurement(VICTIM, 1, 12, {"seen": torch.tensor(5)})]
    monkeypatch.setattr(type(site), "answer", lambda *given: worked.append(given) or measured)
    head, body = encode_request(StatisticsRequest(job.canonical, job.hash, 1, {}, run="r"))
    sent = []
    with in_a_server_app():
        for nonce in ("one", "two"):
            texts = {"request": head, "names": json.dumps([VICTIM]), "nonce": nonce}
            content = packed(texts, bodies_of({"tensors": body}))
            message = Message(content, dst_node_id=1, message_type="train")
            sent.append(client_app.work(message, None, lambda job, context: site).content)  # type: ignore[arg-type]
    seals = [seal_of(content) for content in sent]
    assert [seal.nonce for seal in seals if seal] == ["one", "two"]
    assert unpacked(sent[0]) == unpacked(sent[1])
    assert len(worked) == 1
