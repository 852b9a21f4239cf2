"""A server's log: who submitted, what left, what came, what was decided; whole or found out."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

import atoll.system.durable_files as durable_files
from atoll.cli.main import run as command_line
from atoll.client.audit_log import AuditLog
from atoll.errors import DataError, JobError
from atoll.job.job import Job
from atoll.protocol.requests import TrainRequest
from atoll.report.run_result import RunResult
from atoll.server.audit_log import ServerAuditLog
from atoll.server.received import MOST_UNSIGNED
from atoll.server.run_audit import SECRET, RunAuditLog
from atoll.system.audit_file import FILE, verify
from tests.client.test_audit_log import lines_of, small_job
from tests.federation.places import provisioned
from tests.support.memory_grid import MemoryGrid

FORGER = "client-0002"


@dataclass(frozen=True)
class Played:
    """A run in whose first round a site sends what it hasn't signed, and in the second does so once."""

    job: Job
    server: Path
    site: Path
    result: RunResult
    syncs: int


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("server-audit")
    job = small_job(federation={"clients": 3, "rounds": 2, "quorum": 0.5})
    grid = MemoryGrid.of(job, folder, signed=True)
    forged: list[object] = []

    def change(kind: str, site: str, reply: RecordDict) -> RecordDict:
        if (kind, site) == ("train", FORGER):
            forged.append(reply.config_records["head"]["seal/round"])
            if forged[-1] == 1 or forged.count(2) == 1:
                reply.config_records["head"]["seal/nonce"] = "another"
        return reply

    grid.change = change
    grid.sites["client-0001"].audit = AuditLog.open(folder / "site")
    audit = RunAuditLog.open(folder / "state", job)
    syncs: list[str] = []
    counted = CountedSyncs(syncs)
    with pytest.MonkeyPatch.context() as patch, audit.of_run(7, folder / "run", resume=False) as end:
        patch.setattr(durable_files, "os", counted)
        result = grid.run(job, folder / "run", audit)
        end(result)
    log = [path for path in syncs if path.startswith(str(folder / "state"))]
    return Played(job, folder / "state", folder / "site", result, len(log))


class CountedSyncs:
    """The system's calls, of which syncs are noted with the file that they are of."""

    def __init__(self, syncs: list[str]) -> None:
        self.syncs = syncs

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, handle: int) -> None:
        self.syncs.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        os.fsync(handle)


def of(lines: list[dict[str, Any]], asked: str, decision: str) -> list[dict[str, Any]]:
    return [line for line in lines if (line.get("asked"), line.get("decision")) == (asked, decision)]


def test_every_step_of_a_run_has_its_line(played: Played) -> None:
    first, *lines = lines_of(played.server)
    assert first["format"] == 1
    assert {line["job_sha256"] for line in lines} == {played.job.hash}
    assert [line["site"] for line in of(lines, "greeting", "received")] == [
        f"client-000{number}" for number in range(3)
    ]
    assert of(lines, "clients", "found")[0]["clients"] == [f"client-000{number}" for number in range(3)]
    assert [line["round"] for line in of(lines, "train", "asked")] == [1, 2]
    assert [line["round"] for line in of(lines, "round", "ended")] == [1, 2]
    assert of(lines, "run", "completed")[0]["model"] == played.result.model_sha256
    assert verify(played.server).lines == len(lines)


def test_a_forged_reply_is_written_with_the_rule_that_refused_it(played: Played) -> None:
    lines = lines_of(played.server)
    came, ended = of(lines, "train", "received")[0], of(lines, "round", "ended")[0]
    assert came["of"][FORGER]["refused"] == "its message answers another request of this round"
    assert len(came["of"][FORGER]["sha256"]) == 64
    assert ended["set_aside"] == {FORGER: "its message answers another request of this round"}


def test_a_site_is_asked_again_for_what_it_has_not_signed_and_each_such_message_has_its_line(
    played: Played,
) -> None:
    lines = lines_of(played.server)
    refused = of(lines, "train", "refused")
    assert [line["round"] for line in refused] == [1] * (MOST_UNSIGNED - 1) + [2]
    assert {line["of"][FORGER]["refused"] for line in refused} == {
        "its message answers another request of this round"
    }
    assert of(lines, "train", "received")[1]["of"][FORGER]["what"] == "Update"
    assert of(lines, "round", "ended")[1]["set_aside"] == {}


def test_the_logs_of_server_and_site_have_the_same_hashes(played: Played) -> None:
    sent = [line for line in lines_of(played.site) if line.get("decision") == "sent"]
    came = [line for line in lines_of(played.server) if line.get("decision") == "received"]
    heard = [line["of"]["client-0001"] for line in came if "of" in line]
    assert [(line["sha256"], line["bytes"], line["what"]) for line in sent] == [
        (line["sha256"], line["bytes"], line["what"]) for line in heard
    ]


def test_a_round_has_three_lines_for_its_updates_and_waits_for_the_disk_once(played: Played) -> None:
    lines = lines_of(played.server)
    trained = [
        line for line in lines if line.get("asked") in ("train", "round") and line["decision"] != "refused"
    ]
    assert len(trained) == 3 * played.job.federation.rounds
    # The clients found, each round, and the run's end; its beginning came before the count.
    assert played.syncs == 1 + played.job.federation.rounds + 1


def test_any_flipped_byte_is_found_and_its_line_named(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (played.server / FILE).read_bytes()
    end = whole[:-1].rfind(b"\n")
    for place in range(0, end, 97):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1
        (tmp_path / FILE).write_bytes(spoilt)
        with pytest.raises(DataError, match=r"audit\.jsonl line \d"):
            verify(tmp_path)
    assert command_line(["verify-log", str(tmp_path / FILE)]) == 2
    assert "audit.jsonl line" in capsys.readouterr().err


def test_a_servers_log_is_verified_by_its_kit_or_its_file(
    played: Played, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = provisioned(tmp_path, ("north",), 9092)["server"]
    assert command_line(["verify-log", str(kit)]) == 2
    assert "a server that has had a job" in capsys.readouterr().err
    (kit / "state").mkdir()
    shutil.copy(played.server / FILE, kit / "state")
    for named in (kit, kit / "state" / FILE):
        assert command_line(["verify-log", str(named)]) == 0
        assert verify(played.server).sha256 in capsys.readouterr().out


def test_who_submits_is_written_down(tmp_path: Path) -> None:
    ServerAuditLog.open(tmp_path, small_job()).submitted(12, Path("/runs/first"))
    (line,) = lines_of(tmp_path)[1:]
    assert (line["asked"], line["decision"], line["flower_run"]) == ("submit", "accepted", 12)
    assert (line["uid"], line["out"]) == (os.getuid(), "/runs/first")


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    audit = RunAuditLog.open(tmp_path, small_job())
    with pytest.raises(JobError), audit.of_run(3, tmp_path, resume=True):
        raise JobError("too few\nclients")
    begun, failed = lines_of(tmp_path)[1:]
    assert begun["decision"] == "resumed"
    assert (failed["decision"], failed["why"]) == ("failed", "too few clients")


def test_a_secret_cohort_stays_secret(tmp_path: Path) -> None:
    secret = small_job(
        federation={"clients": 3, "rounds": 1, "cohort_rate": 0.5},
        privacy={"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
    )
    audit = RunAuditLog.open(tmp_path, secret)
    request = TrainRequest(secret.canonical, secret.hash, 1, {}, {})
    audit.sent(request, "{}", {"north": (["north"], b"")})
    audit.answered(request, {"north": {"what": "Update"}})
    text = (tmp_path / FILE).read_text()
    assert text.count(SECRET) == 2 and "north" not in text
    assert json.loads(text.splitlines()[-1])["of"] == SECRET
