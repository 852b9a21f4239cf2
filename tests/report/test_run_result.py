"""`result.json` as an object: what is written is what is read, and what is none is refused in one line."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import atoll
from atoll.errors import ConfigError, JobError
from atoll.job.job import Job
from atoll.report.run_result import RESULT_FILE, RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.support.results import result_with

JOB = {
    "name": "tiny",
    "seed": 1,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "test_fraction": 0.2},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "federation": {"clients": 3, "rounds": 2},
    "evaluate": {"contributions": "leave-one-out"},
    "privacy": {
        "unit": "example", "noise_multiplier": 1.0, "clipping_norm": 1.0, "delta": 1e-5,
        "seeded_noise": True, "sampling_rate": 0.1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    out = tmp_path_factory.mktemp("result") / "run"
    return out, simulate(Job.parse(JOB, origin="test"), out, on_event=ignore_events)


def test_what_a_run_returns_is_what_its_file_and_its_log_hold(ran: tuple[Path, RunResult]) -> None:
    out, result = ran
    assert RunResult.read(out) == atoll.Run(out).result == result
    assert json.loads((out / RESULT_FILE).read_text()) == result.to_json()
    assert [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] == result.rounds


def test_what_there_is_nothing_of_is_no_key_and_what_is_unknown_is_null(
    ran: tuple[Path, RunResult],
) -> None:
    _, result = ran
    assert result.contributions is not None and result.samples is result.plugins is result.forgotten is None
    table = result.to_json()
    assert "contributions" in table and not {"samples", "plugins", "forgotten"} & table.keys()
    assert table["compression"] is table["personal"] is table["simulated_seconds"] is None


def test_reading_and_writing_change_no_number(tmp_path: Path) -> None:
    clients = {"a": {"accuracy": 1, "loss": None, "examples": 7}}
    result = result_with(seconds=3, final={"server": {}, "clients": clients})
    result.write(tmp_path)
    first = (tmp_path / RESULT_FILE).read_bytes()
    RunResult.read(tmp_path).write(tmp_path)
    assert (tmp_path / RESULT_FILE).read_bytes() == first
    assert json.loads(first)["final"]["clients"]["a"] == {"accuracy": 1, "loss": None, "examples": 7}


def line_of(**fields: Any) -> dict[str, Any]:
    return {
        "round": 1, "cohort": [], "loss": None, "metrics": {}, "trained": 0, "bytes_up": 0, "bytes_down": 0,
        "set_aside": {}, "model_sha256": "", **fields,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.pop("notes"), r"notes: missing, expected a result as Atoll VERSION writes it"),
        (lambda table: table.update(colour="red"), r"colour: unknown key, expected a result as Atoll"),
        (lambda table: table.update(seconds="3"), r"seconds: .*number"),
        (lambda table: table.update(final={"server": {}}), r"final\.clients: "),
        (lambda table: table.update(rounds=[line_of(trained=0.5)]), r"rounds\.0\.trained: .*integer"),
        (lambda table: table.update(rounds=[{"round": 1}]), r"rounds\.0\.cohort: "),
        (lambda table: table["privacy"].update(units={"client": {}}), r"privacy\.units\.client\."),
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_in_a_line_with_file_and_key(
    tmp_path: Path, change: Any, said: str
) -> None:
    table = json.loads(json.dumps(result_with().to_json()))
    change(table)
    (tmp_path / RESULT_FILE).write_text(json.dumps(table))
    where = f"^{tmp_path / RESULT_FILE}: "
    with pytest.raises(ConfigError, match=where + said.replace("VERSION", version("atoll"))) as raised:
        RunResult.read(tmp_path)
    assert "\n" not in str(raised.value)
    assert RunResult.of_job(tmp_path, "") is None


@pytest.mark.parametrize(
    ("text", "said"), [("", "not valid JSON"), ("[]", "found no table"), (None, "cannot be read")]
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / RESULT_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"{tmp_path / RESULT_FILE}: .*{said}"):
        RunResult.read(tmp_path)


def test_a_result_is_of_the_job_whose_hash_it_has(tmp_path: Path) -> None:
    result = result_with(job_hash="this")
    result.write(tmp_path)
    assert RunResult.of_job(tmp_path, "this") == result
    assert RunResult.of_job(tmp_path, "another") is None


def test_a_disk_that_fails_is_said_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"{tmp_path / 'gone' / RESULT_FILE}: not written"):
        result_with().write(tmp_path / "gone")
