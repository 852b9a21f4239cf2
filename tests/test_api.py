"""`import atoll`: a run, a sweep and predictions from Python, the same as from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import atoll
from atoll.server.events import ignore_events
from atoll.server.run.directory import job_toml
from atoll.sim.engines.engine import simulate
from tests.cli.test_cli import DIGITS


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "digits.toml"
    path.write_text(job_toml(atoll.Job.parse(DIGITS, origin="test")))
    return path


@pytest.fixture(scope="module")
def run(job_file: Path) -> atoll.Run:
    return atoll.simulate(atoll.load_job(job_file, {"train.lr": 0.05}), job_file.parent / "run")


def test_a_run_has_the_bits_of_the_engine_and_tells_what_it_found(run: atoll.Run, tmp_path: Path) -> None:
    expected = simulate(run.job, tmp_path / "again", on_event=ignore_events, report=False)
    assert run.result.model_sha256 == expected.model_sha256
    assert run.job.train.lr == 0.05 and run.report.is_file()
    assert [line["round"] for line in run.rounds] == [1]
    assert 0 <= run.metrics["federated"]["accuracy"] <= 1


def test_a_run_predicts(run: atoll.Run, tmp_path: Path) -> None:
    from atoll.data.images import image_bytes
    from atoll.datasets.registry import load_source

    picture = tmp_path / "one.png"
    picture.write_bytes(image_bytes(load_source("digits")["train"].slice(0, 1).to_pylist()[0]["image"]))
    (answer,) = run.predict([str(picture)])
    assert answer["label"] in set("0123456789")


@pytest.mark.slow
def test_a_run_is_exported(run: atoll.Run) -> None:
    folder = run.export("safetensors")
    assert folder == run.folder / "exports" / "safetensors" and (folder / "model.safetensors").is_file()
    with pytest.raises(atoll.InputError, match="exists and is not empty"):
        run.export("safetensors")


@pytest.mark.slow
@pytest.mark.processes
def test_a_sweep_has_a_row_for_each_run(job_file: Path, tmp_path: Path) -> None:
    swept = atoll.sweep(job_file, {"train.lr": [0.01, 0.1]}, tmp_path / "sweep", seeds=2, workers=1)
    assert len(swept.rows) == 4 and {row["train.lr"] for row in swept.rows} == {"0.01", "0.1"}
    assert swept.picture.is_file()


@pytest.mark.parametrize("changes", [{"train.lr": "fast"}, {"train.speed": 3}])
def test_a_wrong_key_is_one_line(job_file: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(atoll.InputError, match=next(iter(changes)).replace(".", r"\.")) as told:
        atoll.load_job(job_file, changes)
    assert "\n" not in str(told.value)


def test_what_is_not_offered_is_no_attribute() -> None:
    assert not hasattr(atoll, "sweeep")
    assert all(hasattr(atoll, name) for name in atoll.__all__)


@pytest.mark.processes
def test_importing_atoll_does_not_bring_in_torch() -> None:
    code = "import sys, atoll; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
