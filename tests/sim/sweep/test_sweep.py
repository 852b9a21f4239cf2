"""Sweeps: real runs over real processes, what is drawn from them, and what is refused before they start."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.privacy.accounting import Release, epsilon
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.sweep.grid import Base, Grid, Planned, SweepFolder, exclusive_lock, planned, split_values
from atoll.sim.sweep.plot import axis_of, frontier_png
from atoll.sim.sweep.results import Estimate, Row, losses, reference, sentence, table
from atoll.sim.sweep.runner import RunPool
from atoll.sim.sweep.selection import selections
from tests.support.processes import atoll
from tests.support.results import result_with

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TABLE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "validation_fraction": 0.0},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "train": {"batch_size": 100, "lr": 4.0},
    "federation": {"clients": 3, "rounds": 3, "secure_threshold": 1.0},
    "privacy": {
        "unit": "example", "where": "distributed", "epsilon": 1.0, "delta": 1e-5,
        "sampling_rate": 0.25, "steps": 1, "seeded_noise": True,
    },
    "evaluate": {"every": 3, "baselines": ["zero_shot", "pooled"]},
}  # fmt: skip
GRID = ("--vary", "privacy.epsilon=2,inf", "--vary", "privacy.where=client,distributed", "--seeds", "2")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "tiny.toml"
    path.write_text(tomli_w.dumps(TABLE))
    return path


@pytest.fixture(scope="module")
def swept(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that is complete."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert command_line(["sweep", str(job), *GRID, "--out", str(out), "--workers", "2"]) == 0
    return out


@pytest.fixture
def copied(swept: Path, tmp_path: Path) -> Path:
    """A copy of the complete sweep, to change."""
    return Path(shutil.copytree(swept, tmp_path / "out"))


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def base_of(table: dict[str, Any]) -> Base:
    return Base(table, "tiny.toml", Path())


def test_every_combination_runs_once_with_every_seed(swept: Path) -> None:
    """Without privacy it doesn't matter where noise would be: 2 x (2 + 1) runs, not 2 x 4."""
    found = [(line["privacy.epsilon"], line["privacy.where"], line["seed"]) for line in lines_of(swept)]
    assert found == [
        ("2", "client", "3"), ("2", "distributed", "3"), ("inf", "", "3"),
        ("2", "client", "4"), ("2", "distributed", "4"), ("inf", "", "4"),
    ]  # fmt: skip


def test_a_run_of_a_sweep_is_the_run_of_its_job_bit_for_bit(swept: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        line = lines_of(swept)[number]
        job = Job.load(swept / line["path"] / "job.toml")
        alone = simulate(job, tmp_path / str(number), on_event=ignore_events, report=False)
        assert alone.model_sha256 == line["model_sha256"]
        assert alone.final["server"]["accuracy"] == float(line["accuracy"])
        kept = json.loads((swept / line["path"] / "result.json").read_text())
        assert alone.baselines == kept["baselines"] and set(kept["baselines"]) == {"zero_shot", "pooled"}


def test_the_table_says_what_was_spent(swept: Path) -> None:
    for line in lines_of(swept):
        if line["privacy.epsilon"] == "inf":
            assert not line["epsilon_spent"] and not line["noise_multiplier"]
            continue
        spent = {Release(float(line["noise_multiplier"]), 0.25): 3}
        assert float(line["epsilon_spent"]) == epsilon(spent, 1e-5) <= 2
        assert float(line["delta"]) == 1e-5


def test_the_page_tells_the_loss_seed_by_seed(swept: Path) -> None:
    score = {
        (line["privacy.epsilon"], line["privacy.where"], line["seed"]): 100 * float(line["accuracy"])
        for line in lines_of(swept)
    }
    page = (swept / "sweep.md").read_text()
    for where in ("client", "distributed"):
        a, b = (score["inf", "", seed] - score["2", where, seed] for seed in "34")
        # Student's t with one degree of freedom has 97.5 % of its mass below tan(0.475 pi) = 12.7062;
        # two values' mean has the standard error |a - b| / 2.
        half = 12.7062 * abs(a - b) / 2
        assert f"| privacy.epsilon 2, privacy.where {where} | {(a + b) / 2:.1f} ± {half:.1f} |" in page
    assert "At epsilon 2 with privacy.where client you " in page
    assert "points of accuracy against the same run without privacy" in page
    assert "pooled data: 0." in page and "untrained: 0." in page
    assert "they protect nobody" in page
    assert (swept / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_not_run_again(swept: Path, job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.glob("*/result.json")}
    assert command_line(["sweep", str(job), *GRID, "--out", str(swept)]) == 0
    assert "6 runs" in (said := capsys.readouterr().out) and "all are there" in said
    assert before == {path: path.stat().st_mtime_ns for path in swept.glob("*/result.json")}


@pytest.mark.processes
def test_another_grid_takes_what_it_can_use_and_goes_on_with_what_was_begun(
    copied: Path, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(copied)
    begun, blocked = copied / lines[0]["path"], copied / lines[4]["path"]
    (begun / "result.json").unlink()
    shutil.rmtree(blocked)
    blocked.write_text("in the way")
    kept = (copied / lines[1]["path"] / "result.json").stat().st_mtime_ns
    grid = ["--vary", "privacy.where=client,distributed", "--set", "privacy.epsilon=1.0"]
    assert command_line(["sweep", str(job), *GRID, *grid[2:], "--out", str(copied)]) == 2
    assert "in --set and in --vary" in capsys.readouterr().err

    assert command_line(["sweep", str(job), *GRID, "--out", str(copied), "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert "1 of 6 runs failed" in said.err
    assert "failed" in said.out and "privacy.where distributed, seed 4" in said.out
    again = {(line["path"]): line for line in lines_of(copied)}
    assert len(again) == 5 and again[begun.name] == lines[0] | {"seconds": again[begun.name]["seconds"]}
    assert (copied / lines[1]["path"] / "result.json").stat().st_mtime_ns == kept

    smaller = ["--vary", "privacy.epsilon=2", "--seeds", "1", "--set", "privacy.where='distributed'"]
    folder = SweepFolder(copied)
    [run] = planned(Base.load(job, [], ["privacy.epsilon"]), Grid.of(["privacy.epsilon=2"], 1))
    assert folder.of(run) == copied / lines[1]["path"] and folder.result(run) is not None
    assert command_line(["sweep", str(job), *smaller, "--out", str(copied), "--plot-only"]) == 0
    assert [line["model_sha256"] for line in lines_of(copied)] == [lines[1]["model_sha256"]]


def test_plots_are_drawn_anew_from_what_is_there(copied: Path, job: Path) -> None:
    written = {name: (copied / name).read_bytes() for name in ("sweep.csv", "sweep.md", "frontier.png")}
    for name in written:
        (copied / name).unlink()
    assert command_line(["sweep", str(job), "--out", str(copied), "--plot-only"]) == 0
    assert {name: (copied / name).read_bytes() for name in written} == written
    shutil.rmtree(copied / lines_of(copied)[-1]["path"])
    assert command_line(["sweep", str(job), "--out", str(copied), "--plot-only"]) == 0
    assert "1 runs of the grid are not complete" in (copied / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "--vary: missing, expected what the runs differ in"),
        (["--vary", "train.lr"], "--vary train.lr: expected key=value,value"),
        (["--vary", "train.lr=1,,2"], "expected key=value,value"),
        (["--vary", "train.lr=1,2", "--vary", "train.lr=3"], "train.lr: found twice"),
        (["--vary", "train.lr=1,1.0"], "a value is there twice"),
        (["--vary", "train.lr=1,-2"], "train.lr"),
        (["--vary", "train.rate=1,2"], "rate"),
        (["--vary", "privacy.epsilon=1,none"], "privacy.epsilon"),
        (["--vary", "privacy.where=client,server"], "expected 'client' or 'distributed'"),
        (["--vary", "strategy.name=fedavg,fedevg"], "fedevg"),
        (["--vary", "backbone.name=raw:pixels,hf:no/such", "--set", "backbone.offline=true"], "no/such"),
        (["--vary", "seed=1,2"], "expected --seeds N"),
        (["--vary", "data.partition=[1"], "not valid TOML"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], pattern: str
) -> None:
    out = tmp_path / "out"
    assert command_line(["sweep", str(job), *arguments, "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and pattern in line, line
    assert not list(out.glob("*"))


def test_a_folder_of_something_else_is_refused(
    copied: Path, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(["sweep", str(job), *GRID, "--out", str(copied), "--set", "train.lr=1.0"]) == 2
    assert "holds a sweep of another job (train.lr)" in capsys.readouterr().err
    assert command_line(["sweep", str(job), *GRID, "--out", str(job.parent)]) == 2
    assert "no sweep's folder" in capsys.readouterr().err
    assert command_line(["sweep", str(job), *GRID, "--out", str(job)]) == 2
    assert "found a file" in capsys.readouterr().err
    assert command_line(["sweep", str(job), "--out", str(tmp_path / "new"), "--plot-only"]) == 2
    assert "no sweep's folder (no sweep.json)" in capsys.readouterr().err
    with exclusive_lock(copied, "sweep"):
        assert command_line(["sweep", str(job), *GRID, "--out", str(copied)]) == 2
    assert "another sweep runs in it" in capsys.readouterr().err


@pytest.mark.parametrize("first", [".lock", ".sweep.json.partial"])
def test_what_a_kill_at_the_start_left_is_no_hindrance(tmp_path: Path, first: str) -> None:
    (tmp_path / first).write_text("{")
    SweepFolder(tmp_path).check(base_of(TABLE))
    (tmp_path / "mine").write_text("{")
    with pytest.raises(ConfigError, match="no sweep's folder"):
        SweepFolder(tmp_path).check(base_of(TABLE))


def test_values_are_split_at_commas_that_stand_alone() -> None:
    assert split_values("a, 'b,c' ,[1,2],{k = 'x,y'}") == ["a", "'b,c'", "[1,2]", "{k = 'x,y'}"]
    grid = Grid.of(["train.lr=0.1,1", "tune.hidden=4,8"], 3)
    assert [list(c.values()) for c in grid.combinations()] == [
        ["0.1", "4"], ["0.1", "8"], ["1", "4"], ["1", "8"],
    ]  # fmt: skip


def test_without_privacy_nothing_of_the_promise_is_left_and_everything_else_stays() -> None:
    base = base_of(TABLE)
    values, job = base.job({"privacy.epsilon": "inf", "train.lr": "2.0", "privacy.clipping_norm": "0.5"})
    assert values == {"privacy.epsilon": math.inf, "train.lr": 2.0, "privacy.clipping_norm": None}
    assert job.privacy.units == () and job.federation.secure_threshold is None
    _, private = base.job({"privacy.epsilon": "2", "train.lr": "2.0"})
    assert private.federation.secure_threshold == 1.0
    assert (private.train, private.data, private.seed) == (job.train, job.data, job.seed)
    with pytest.raises(ConfigError, match="secure_threshold has no meaning"):
        base_of({**TABLE, "privacy": {}}).job({"train.lr": "1.0"})  # not the sweep's doing


def test_seed_i_is_the_same_in_every_combination() -> None:
    runs = planned(base_of(TABLE), Grid.of(["train.lr=1,2"], 3))
    assert [(run.values["train.lr"], run.job.seed) for run in runs] == [
        (1, 3), (2, 3), (1, 4), (2, 4), (1, 5), (2, 5),
    ]  # fmt: skip
    assert len({run.folder for run in runs}) == 6
    assert runs[0].folder.startswith("lr-1_seed-3_")


def row(score: float, seed: int, epsilon_: float | None = None, **values: Any) -> Row:
    """A run that was measured; with an epsilon, its job promises as much and has spent it."""
    table = {**TABLE, "seed": seed, "privacy": {}, "federation": {"clients": 3, "rounds": 3}}
    privacy: dict[str, Any] = {"unit": "none", "epsilon": None, "delta": None, "noise_multiplier": None}
    if epsilon_ is not None:
        table["privacy"] = {**TABLE["privacy"], "epsilon": epsilon_, "seeded_noise": False}
        table["evaluate"] = {}
        privacy = {
            "unit": "example", "epsilon": epsilon_, "delta": 1e-5, "noise_multiplier": 1.0,
            "seeded_noise": False, "units": {"example": {"delta": 1e-5, "releases": 3}},
        }  # fmt: skip
    given = {"privacy.epsilon": math.inf if epsilon_ is None else epsilon_, **values}
    result = result_with(
        final={"server": {"accuracy": score, "loss": 1.0}, "clients": {}},
        baselines={"pooled": {"accuracy": 0.9 + seed / 100}},
        privacy=privacy,
    )
    return Row.of(Planned(given, Job.parse(table, origin="test")), result, "run")


def test_means_and_intervals_are_students() -> None:
    # 2, 4, 4, 6: mean 4, variance 8 / 3; t with 3 degrees of freedom at 97.5 % is 3.182446
    found = Estimate.of([2.0, 4.0, 4.0, 6.0])
    assert found.mean == 4 and found.deviation == pytest.approx(math.sqrt(8 / 3))
    assert found.half == pytest.approx(3.182446 * math.sqrt(8 / 3) / 2, rel=1e-6)
    assert Estimate.of([1.0]) == Estimate(1.0, None, None, 1)


def test_losses_are_of_pairs_and_a_seed_without_its_pair_counts_nothing() -> None:
    rows = [row(0.9, 1), row(0.8, 2), row(0.7, 1, 1.0), row(0.7, 2, 1.0), row(0.1, 3, 1.0)]
    [loss] = losses(rows)
    # 20 and 10 points: mean 15, deviation 5 sqrt 2, t with 1 degree of freedom 12.7062 over sqrt 2
    assert loss.points.mean == pytest.approx(15) and loss.points.half == pytest.approx(63.531, rel=1e-4)
    assert sentence(rows).startswith("At epsilon 1 you lose 15.0 ± 63.5 points of accuracy against")
    assert "add inf to --vary" in sentence(rows[2:])
    assert [line.score for line in table(rows)] == ["0.850 ± 0.071", "0.500 ± 0.346"]


def test_of_hyperparameters_the_sentence_takes_the_best() -> None:
    runs = [(1, 0.9, 0.5), (2, 0.95, 0.8), (4, 0.8, 0.7)]
    rows = [row(plain, 1, **{"train.lr": lr}) for lr, plain, _ in runs]
    rows += [row(private, 1, 1.0, **{"train.lr": lr}) for lr, _, private in runs]
    assert [loss.points.mean for loss in losses(rows)] == pytest.approx([40, 15, 10])
    assert sentence(rows) == (
        "At epsilon 1 with train.lr 2 you lose 15.0 points of accuracy against the same run without"
        " privacy (one seed, so that there is no interval)."
    )


def test_a_baseline_counts_once_for_every_seed() -> None:
    rows = [row(0.9, 1), row(0.8, 2), row(0.7, 1, 1.0), row(0.7, 1, 2.0)]
    assert reference(rows, "pooled") == Estimate.of([0.91, 0.92])
    assert reference(rows, "local_only") is None
    other = [row(0.9, 5, **{"train.lr": 1}), row(0.9, 6, **{"train.lr": 2})]
    assert reference(other, "pooled") == Estimate.of([0.96])


def test_a_hyperparameter_that_was_looked_for_is_charged() -> None:
    rows = [row(0.5 + lr / 100 + s / 1000, s, 1.0, **{"train.lr": lr}) for s in (1, 2) for lr in (1, 2, 4)]
    plain = [row(0.9, s, **{"train.lr": lr}) for s in (1, 2) for lr in (1, 2, 4)]
    [pick] = selections(rows + plain)
    assert pick.chosen == {"train.lr": 4} and pick.promise == {"privacy.epsilon": 1.0} and pick.trials == 6
    [[noise]] = {(release.noise_multiplier,) for release in _releases(rows)}
    assert pick.once == epsilon({Release(noise, 0.25): 3}, 1e-5) <= 1.0
    assert pick.all_trials == epsilon({Release(noise, 0.25): 18}, 1e-5) > 2 * pick.once
    assert pick.once < pick.geometric and pick.once < pick.poisson
    assert selections([row(0.5, 1, e, **{"privacy.where": "client"}) for e in (1.0, 2.0)]) == []


def _releases(rows: list[Row]) -> set[Release]:
    from atoll.privacy.dp_plan import dp_plan_of

    found = {dp_plan_of(r.job, "example") for r in rows}
    return {dp_plan.event for dp_plan in found if dp_plan is not None}


def test_the_axis_is_epsilon_or_the_first_key_that_counts() -> None:
    private = [row(0.7, 1, 1.0, **{"train.lr": 1})]
    assert axis_of(private) == "privacy.epsilon"
    plain = [row(0.7, 1, **{"strategy.name": "fedavg", "train.lr": lr}) for lr in (1, 2)]
    for one in plain:
        del one.values["privacy.epsilon"]  # type: ignore[attr-defined]
    assert axis_of(plain) == "train.lr"
    assert sentence(plain) == "The best accuracy, 0.700, has strategy.name fedavg, train.lr 1."
    for rows in (private, plain):
        assert frontier_png(rows, "a title").startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_sweep_goes_on_and_ends_with_the_same_bits(swept: Path, job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sweep", job, *GRID, "--out", out, "--workers", "2"]
    for kill in (signal.SIGINT, signal.SIGKILL):
        process = atoll(*command, main="tests.support.pausing:main", env={"ATOLL_TEST_PAUSE_AFTER": "1"})
        assert process.stdout is not None
        assert any(line == "paused\n" for line in process.stdout)
        process.send_signal(kill)
        _, said = process.communicate()
        assert process.returncode == (130 if kill is signal.SIGINT else -signal.SIGKILL), said
        if kill is signal.SIGINT:
            assert said.startswith("interrupted: ") and "the same command goes on" in said
    process = atoll(*command)
    assert process.communicate()[1] == "" and process.returncode == 0
    hashes = [[line["model_sha256"] for line in lines_of(folder)] for folder in (out, swept)]
    assert hashes[0] == hashes[1]


@pytest.mark.slow
@pytest.mark.processes
def test_a_worker_that_dies_costs_no_run_but_the_one_that_killed_it(tmp_path: Path) -> None:
    runs = planned(base_of(TABLE), Grid.of(["train.lr=1,2"], 2))
    told: list[tuple[str, str | None]] = []
    with RunPool(2) as crew:
        crew.start()
        pool = crew._pool[0]
        assert all(pool.submit(os.getpid).result() for _ in range(2))
        for process in list(pool._processes.values()):
            os.kill(process.pid or 0, signal.SIGKILL)
        failures = crew.play(
            [(run, tmp_path / run.folder) for run in runs],
            lambda run, failure: told.append((run.description, failure)),
        )
    assert failures == {} and sorted(told) == sorted((run.description, None) for run in runs)
    assert all((tmp_path / run.folder / "result.json").is_file() for run in runs)
