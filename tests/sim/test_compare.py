"""`atoll simulate --compare`: which runs there are, what is refused before, the table and the picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from scipy import stats

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.server.job_checks import check_simulated
from atoll.sim.engines.engine import simulate
from atoll.sim.sweep.grid import Base
from atoll.sim.sweep.strategies import compared, names_of, runs_of, write_comparison
from tests.support.results import result_with

TABLE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "train": {"lr": 0.5},
    "federation": {"clients": 4, "rounds": 2},
    "strategy": {"name": "scaffold", "options": {"option": 1}},
}


def base() -> Base:
    return Base(TABLE, "tiny.toml", Path())


def result(seed: int, accuracy: float, clients: list[float]) -> RunResult:
    lines = [{"round": 1, "metrics": {}}, {"round": 2, "metrics": {"accuracy": accuracy}}]
    at = {f"client-{n:04d}": {"examples": 5, "accuracy": value} for n, value in enumerate(clients)}
    return result_with(
        rounds=lines, final={"server": {"accuracy": accuracy}, "clients": at}, model_sha256=f"{seed}",
        bytes_up=1_000_000 * seed, bytes_down=2_000_000,
    )  # fmt: skip


def test_every_strategy_runs_with_every_seed_and_only_the_jobs_own_keeps_its_options() -> None:
    runs = runs_of(base(), ["fedavg", "scaffold", "qffl"], 2, check_simulated)
    assert [(run.job.strategy.name, run.job.seed) for run in runs] == [
        ("fedavg", 3), ("scaffold", 3), ("qffl", 3), ("fedavg", 4), ("scaffold", 4), ("qffl", 4),
    ]  # fmt: skip
    assert runs[0].job.strategy.options is None and runs[1].job.strategy.options == {"option": 1}
    assert len({run.folder for run in runs}) == 6


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("fedavg,scafold", r"--compare: unknown strategy 'scafold', did you mean 'scaffold'"),
        ("fedavg, fedavg", r"--compare: fedavg is there twice"),
        ("fedavg,", r"--compare: unknown strategy ''"),
        ("fedavg,bulyan", r"--compare: bulyan can't run with this job: strategy\.options\.hostile: .* 7"),
        ("fedavg,flwr:FedAvgg", r"--compare: flwr:FedAvgg can't run .* did you mean 'FedAvg'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_by_name_before_anything_runs(names: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        runs_of(base(), names_of(names), 5, check_simulated)


def test_the_table_has_means_intervals_and_the_worst_tenth_of_clients(tmp_path: Path) -> None:
    runs = runs_of(base(), ["fedavg"], 3, check_simulated)
    scores = (0.5, 0.6, 0.8)
    worst = [[0.1, 0.2, *[0.9] * 9], [0.3, 0.3, *[0.9] * 9], [0.5, 0.6, *[0.9] * 9]]  # 2 of 11 clients
    results = [
        (run, result(s, score, w)) for run, s, score, w in zip(runs, (1, 2, 3), scores, worst, strict=True)
    ]
    [line] = compared(results)
    assert line.score is not None and line.worst is not None
    assert line.score.mean == pytest.approx(np.mean(scores))
    low, _ = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
    assert line.score.mean - line.score.half == pytest.approx(low)
    assert line.worst.mean == pytest.approx(np.mean([0.15, 0.3, 0.55]))
    assert line.bytes_up == 2e6 and list(line.curve) == [2]
    files = write_comparison(tmp_path, results, "tiny", missing=1)
    assert files["picture"].read_bytes().startswith(b"\x89PNG")
    page = files["table"].read_text()
    assert "| fedavg | 3 | accuracy | 0.633 ± 0.379 | 0.333 ± 0.502 | 2 | 2 |" in page
    assert "1 runs are not complete" in page


@pytest.mark.parametrize(
    "more", [["--resume"], ["--engine", "loop"], ["--track", "tensorboard"], ["--force"]]
)
def test_an_option_without_meaning_beside_it_is_refused(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(TABLE))
    assert command_line(["simulate", str(path), "--compare", "fedavg", *more]) == 2
    assert f"{more[0]}: has no meaning with --compare" in capsys.readouterr().err
    assert command_line(["simulate", str(path), "--seeds", "2"]) == 2
    assert "--seeds: has no meaning without --compare" in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.slow
def test_a_comparison_leaves_one_folder_and_its_runs_are_those_of_their_jobs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "tiny.toml", tmp_path / "out"
    path.write_text(tomli_w.dumps(TABLE))
    command = ["simulate", str(path), "--compare", "fedavg,afl", "--seeds", "2", "--out", str(out)]
    assert command_line([*command, "--workers", "2"]) == 0
    said = capsys.readouterr().out
    for name in ("compare.csv", "compare.md", "compare.png"):
        assert str(out / name) in said and (out / name).is_file()
    with (out / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["strategy"], line["seed"]) for line in lines] == [
        ("fedavg", "3"), ("afl", "3"), ("fedavg", "4"), ("afl", "4"),
    ]  # fmt: skip
    alone = simulate(
        Job.load(out / lines[1]["path"] / "job.toml"),
        tmp_path / "alone",
        on_event=ignore_events,
        report=False,
    )
    assert alone.model_sha256 == lines[1]["model_sha256"]
    before = json.loads((out / lines[0]["path"] / "result.json").read_text())
    assert command_line(command) == 0
    assert "all are there" in capsys.readouterr().out
    assert json.loads((out / lines[0]["path"] / "result.json").read_text()) == before
