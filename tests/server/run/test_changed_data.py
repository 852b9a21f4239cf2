"""A simulation is resumed with the data with which it began, or not at all."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.cli.main import run as command_line
from atoll.datasets.synthetic.png import grey_png
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import Event, RoundEnded, ignore_events
from atoll.server.run.directory import DATA_HASHES, job_toml
from atoll.sim.engines.engine import simulate
from atoll.sim.population import partition as partition_module
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.data.test_bad_data import snapshot


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of 12 grey pictures, and two of 3 to test on."""
    for part, count in (("train", 12), ("test", 3)):
        for place, label in enumerate("ab"):
            for number in range(count):
                draw(tmp_path / "data" / part / label / f"{number}.png", 20 * number + 7 * place + count)
    return tmp_path / "data"


def draw(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(grey_png(np.full((8, 8), grey % 256, np.uint8)))


def job_on(source: Path, **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "changed",
        "seed": 3,
        "task": {"name": "image-classification"},
        "data": {"source": str(source)},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "train": {"lr": 0.1, "batch_size": 4},
        "federation": {"clients": 3, "rounds": 3},
    }
    return Job.parse(table | tables, origin="test")


def begun(job: Job, out: Path) -> None:
    """A run that was interrupted after its first round."""

    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(job, out, on_event=stop, report=False)


def resumed(job: Job, out: Path, **options: Any) -> RunResult:
    return simulate(job, out, on_event=ignore_events, report=False, resume=True, **options)


def test_a_picture_that_changed_under_the_same_classes_is_noticed_and_its_clients_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, out = job_on(source), tmp_path / "run"
    expected = simulate(job, tmp_path / "whole", on_event=ignore_events, report=False).model_sha256
    begun(job, out)
    before, picture = snapshot(out), source / "train" / "a" / "5.png"
    old = Population.of(job).data_hashes
    content = picture.read_bytes()
    draw(picture, 1)
    changed = [name for name, known in Population.of(job).data_hashes.items() if old[name] != known]
    assert changed and "the server's test set" not in changed
    (tmp_path / "job.toml").write_text(job_toml(job))
    code = command_line(["simulate", str(tmp_path / "job.toml"), "--out", str(out), "--resume"])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said
    assert f"{out}: cannot resume with changed data: {', '.join(changed)}; put back" in said
    assert snapshot(out) == before
    picture.write_bytes(content)
    assert resumed(job, out).model_sha256 == expected


@pytest.mark.parametrize("change", ["added", "removed", "label", "test"])
def test_any_other_example_is_other_data(source: Path, tmp_path: Path, change: str) -> None:
    job = job_on(source)
    begun(job, tmp_path / "run")
    match change:
        case "added":
            draw(source / "train" / "b" / "more.png", 251)
        case "removed":
            (source / "train" / "b" / "4.png").unlink()
        case "label":
            (source / "train" / "b" / "4.png").rename(source / "train" / "a" / "more.png")
        case "test":
            draw(source / "test" / "a" / "0.png", 77)
    named = "the server's test set;" if change == "test" else "client-000"
    with pytest.raises(ConfigError, match=f"cannot resume with changed data: {named}"):
        resumed(job, tmp_path / "run")


def test_other_names_of_files_and_another_engine_are_no_other_data(source: Path, tmp_path: Path) -> None:
    job = job_on(source)
    expected = simulate(job, tmp_path / "whole", on_event=ignore_events, report=False).model_sha256
    begun(job, tmp_path / "run")
    for number, path in enumerate(sorted(source.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"renamed-{number}.png"))
    assert resumed(job, tmp_path / "run", engine="loop").model_sha256 == expected


def test_a_run_without_a_record_goes_on_and_has_one_from_then_on(source: Path, tmp_path: Path) -> None:
    """As those of older versions."""
    job, record = job_on(source), tmp_path / "run" / DATA_HASHES
    begun(job, tmp_path / "run")
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    written = record.read_bytes()
    record.unlink()
    resumed(job, tmp_path / "run")
    assert record.read_bytes() == written


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", r"data_hashes\.json: damaged: "),
        ("{", r"data_hashes\.json: damaged: "),
        ('{"schema": 9, "hashes": {}}', r"data_hashes\.json: schema 9, this version of Atoll reads 1"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(
    source: Path, tmp_path: Path, content: str, problem: str
) -> None:
    job = job_on(source)
    begun(job, tmp_path / "run")
    (tmp_path / "run" / DATA_HASHES).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        resumed(job, tmp_path / "run")


def test_a_run_that_replaces_another_has_its_own_record(source: Path, tmp_path: Path) -> None:
    job, record = job_on(source), tmp_path / "run" / DATA_HASHES
    begun(job, tmp_path / "run")
    written = record.read_bytes()
    draw(source / "train" / "a" / "0.png", 99)
    simulate(job, tmp_path / "run", on_event=ignore_events, report=False, force=True)
    assert record.read_bytes() != written
    assert resumed(job, tmp_path / "run").rounds[-1]["round"] == 3


def test_a_hash_is_the_sum_of_its_examples(source: Path) -> None:
    """Word by word, modulo 2^64: added up here one by one, in Python's own numbers."""
    for partition in ({"kind": "iid"}, {"kind": "dirichlet", "alpha": 0.3}):
        job = job_on(source, data={"source": str(source), "partition": partition})
        population, task = Population.of(job), task_named(job.task.name)
        parts = {name: population.dataset(job, name) for name in population.names(job)}
        for name, rows in (parts | {"the server's test set": population.test}).items():
            words = [0, 0, 0, 0]
            for key in task.keys(rows):
                for place in range(4):
                    words[place] += int.from_bytes(key[8 * place : 8 * place + 8], "little")
            expected = b"".join((word % 2**64).to_bytes(8, "little") for word in words).hex()
            assert population.data_hashes[name] == expected
        assert len(population.data_hashes) == len(parts) + 1


def test_clients_that_draw_from_one_table_have_one_hash(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_module, "LISTED", 2)
    partition = {"kind": "resampled", "examples": 6}
    job = job_on(source, data={"source": str(source), "partition": partition})
    begun(job, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / DATA_HASHES).read_text())["hashes"]
    assert list(recorded) == ["all clients", "the server's test set"]
    draw(source / "train" / "a" / "0.png", 99)
    with pytest.raises(ConfigError, match="changed data: all clients;"):
        resumed(job, tmp_path / "run")
