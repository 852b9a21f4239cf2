"""A site's log: what was asked, decided and sent, whole or found out, and nothing of the data in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atoll.cli.main import run as command_line
from atoll.client.audit_log import AuditLog
from atoll.errors import DataError
from atoll.job.job import Job
from atoll.protocol.flower_content import unpacked
from atoll.system.audit_file import FILE, verify
from tests.client.test_policy import policy_of
from tests.federation.places import provisioned
from tests.support.memory_grid import MemoryGrid


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, bytes]]]:
    """The state folder of a site after a run, and what it sent: (client, head, body)."""
    folder = tmp_path_factory.mktemp("played")
    job = small_job()
    grid = MemoryGrid.of(job, folder)
    sent: list[tuple[str, str, bytes]] = []

    def seen(kind: str, site: str, reply: Any) -> Any:
        if kind != "query" and site == "client-0001":
            heads, bodies = unpacked(reply)
            sent.extend((name, head, bodies[name]) for name, head in heads.items())
        return reply

    for name, site in grid.sites.items():
        site.audit = AuditLog.open(folder / "state" / name)
    grid.change = seen
    grid.run(job, folder / "run")
    return folder / "state" / "client-0001", sent


def small_job(**tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "logged", "seed": 5,
        "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8, "offline": True},
        "federation": {"clients": 3, "rounds": 2},
    }  # fmt: skip
    return Job.parse(table | tables, origin="test")


def lines_of(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (state / FILE).read_text().splitlines()]


def test_every_message_that_left_has_a_line_with_its_hash(
    played: tuple[Path, list[tuple[str, str, bytes]]],
) -> None:
    state, sent = played
    first, *lines = lines_of(state)
    assert first["format"] == 1
    greeting, *answers = lines
    assert (greeting["asked"], greeting["decision"]) == ("greeting", "told")
    assert greeting["facts"] == {"classes": "10 of them"} and greeting["examples"] > 100
    assert {line["job_sha256"] for line in lines} == {small_job().hash}
    hashes = [hashlib.sha256(head.encode() + b"\0" + body).hexdigest() for _, head, body in sent]
    assert [line["sha256"] for line in answers] == hashes
    assert [line["bytes"] for line in answers] == [len(head) + len(body) for _, head, body in sent]
    assert {line["asked"] for line in answers} == {"train", "evaluate"}
    assert verify(state).lines == len(lines)


def without_a_line(lines: list[bytes]) -> list[bytes]:
    return lines[:2] + lines[3:]


def one_byte(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b"client-0001", b"client-0002"), *lines[3:]]


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a line changed": one_byte,
    "a line removed": without_a_line,
    "two lines swapped": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "a line put in between": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "no JSON": lambda lines: [lines[0], b"{\n", *lines[2:]],
    "another format": lambda lines: [lines[0].replace(b"1", b"2"), *lines[1:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_log_that_was_changed_is_found_out(
    change: str, played: tuple[Path, list[tuple[str, str, bytes]]], tmp_path: Path
) -> None:
    lines = (played[0] / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(CHANGES[change](lines)))
    with pytest.raises(DataError, match=r"audit\.jsonl line \d"):
        verify(tmp_path)
    with pytest.raises(DataError, match=r"audit\.jsonl line \d"):
        AuditLog.open(tmp_path)


def test_any_flipped_bit_is_found(played: tuple[Path, list[tuple[str, str, bytes]]], tmp_path: Path) -> None:
    whole = (played[0] / FILE).read_bytes()
    end = whole[:-1].rfind(b"\n")  # of the last line nothing but its hash tells
    for place in range(0, end, 37):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        (tmp_path / FILE).write_bytes(spoilt)
        with pytest.raises(DataError):
            verify(tmp_path)
    (tmp_path / FILE).write_bytes(whole[: end + 1])
    assert verify(tmp_path).sha256 != verify(played[0]).sha256


def test_what_a_crash_left_unfinished_is_taken_off_and_the_log_goes_on(
    played: tuple[Path, list[tuple[str, str, bytes]]], tmp_path: Path
) -> None:
    whole = (played[0] / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + b'{"before": "12')
    log = AuditLog.open(tmp_path)
    log.greeted(small_job(), [])
    assert (tmp_path / FILE).read_bytes() == whole


def test_a_refusal_is_written_with_its_rule(tmp_path: Path) -> None:
    job = small_job(federation={"clients": 3, "rounds": 1, "quorum": 0.5})
    grid = MemoryGrid.of(job, tmp_path)
    strict = grid.sites["client-0001"]
    strict.audit = AuditLog.open(tmp_path / "state")
    strict.policy = policy_of(tmp_path, "max_rounds = 5\ntuning = ['full']")
    grid.run(job, tmp_path / "run")
    _, greeting = lines_of(tmp_path / "state")
    assert greeting["decision"] == "refused"
    assert greeting["why"] == "its policy: tuning: expected one of full, found tune.method = head"


def test_a_log_is_verified_on_the_command_line(
    played: tuple[Path, list[tuple[str, str, bytes]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = provisioned(tmp_path, ("north",), 9092)["north"]
    assert command_line(["verify-log", str(kit)]) == 2
    assert "no such file; a site that has joined once has one" in capsys.readouterr().err
    (kit / "state").mkdir()
    whole = (played[0] / FILE).read_bytes()
    (kit / "state" / FILE).write_bytes(whole)
    assert command_line(["verify-log", str(kit)]) == 0
    said = capsys.readouterr().out
    assert "is whole" in said and verify(played[0]).sha256 in said
    (kit / "state" / FILE).write_bytes(whole.replace(b"sent", b"kept", 1))
    assert command_line(["verify-log", str(kit)]) == 2
    assert "does not follow the line before it; the log was changed" in capsys.readouterr().err
