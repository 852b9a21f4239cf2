"""A search beside a full grid: how good are the settings that it finds, and in how many runs.

Each job starts from bad settings (a learning rate far too small, large batches). A grid of 36 settings
(learning rate, epochs, batch size, strategy) is played once; then `atoll tune` may try a third as many of
them, with three seeds of its sampler, once among the grid's own values and once in the space that it takes
where nothing is said. What is chosen, by the grid and by the search, is the best on what clients keep back;
the chosen settings are then measured on the test set, which neither has seen.

    python -m benchmarks.tune [--jobs bbc-news,mnist] [--seeds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import tomli_w

import atoll
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.sim.search.space import job_of
from atoll.sim.search.trials import validation_metrics, without_test_set
from atoll.sim.sweep.grid import Base
from benchmarks.metrics import defined

ROOT = Path(__file__).parents[1]
BAD: dict[str, Any] = {
    "train.lr": 0.001, "train.epochs": 1, "train.batch_size": 128, "strategy": {"name": "fedavg"},
    "evaluate": {"every": 1},
}  # fmt: skip
GRID: dict[str, Sequence[Any]] = {
    "train.lr": [0.01, 0.1, 1.0],
    "train.epochs": [1, 4],
    "train.batch_size": [16, 64],
    "strategy.name": ["fedavg", "fedavgm", "fedadam"],
}
POINT = 0.01


@dataclass(frozen=True)
class Found:
    """The settings that were chosen: accuracy on what clients keep back and on the test set, runs it took."""

    how: str
    validation: float
    test: float
    runs: int
    settings: str

    def beside(self, grid: Found) -> str:
        """A line of the table, with the points that it is behind the grid."""
        behind = [100 * (a - b) for a, b in ((grid.validation, self.validation), (grid.test, self.test))]
        return (
            f"{self.how:<34}{self.validation:>10.3f}{self.test:>8.3f}{behind[0]:>10.1f}{behind[1]:>8.1f}"
            f"{self.runs:>6}  {self.settings}"
        )


def bad_job(name: str, folder: Path) -> Path:
    """The job file with bad settings."""
    table = tomllib.loads((ROOT / "jobs" / f"{name}.toml").read_text("utf-8"))
    for key, value in BAD.items():
        section, _, inner = key.partition(".")
        if inner:
            table.setdefault(section, {})[inner] = value
        else:
            table[section] = value
    path = folder / f"{name}.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def grid_best(name: str, path: Path, folder: Path) -> tuple[Found, Found]:
    """The best of all the grid's settings by what clients keep back, and, beside it, by the test set."""
    table = tomllib.loads(path.read_text("utf-8"))
    base = Base(table, str(path), path.parent)
    population = Population.of(job_of(base, {}))
    found: list[tuple[tuple[float, float], int, Job]] = []
    tests: list[float] = []
    for number, values in enumerate(product(*GRID.values())):
        job = job_of(base, {key: str(value) for key, value in zip(GRID, values, strict=True)})
        metrics = validation_metrics(
            job, folder / f"grid-{number}", without_test_set(job, population), ignore_events
        )
        found.append(((defined(metrics["accuracy"]), -defined(metrics["loss"])), number, job))
        tests.append(on_test_set(job, folder / f"grid-{number}-test"))
    print(f"{name}: the grid is played", file=sys.stderr)
    best = max(found, key=lambda one: (one[0], -one[1]))[1]
    lucky = max(range(len(found)), key=lambda number: tests[number])
    chosen, luckiest = (
        Found(how, found[number][0][0], tests[number], len(found), words(found[number][2]))
        for how, number in (("grid", best), ("grid, had the test set chosen", lucky))
    )
    return chosen, luckiest


def on_test_set(job: Job, folder: Path) -> float:
    """The accuracy that the job ends with, as `atoll simulate` says it."""
    result = simulate(job, folder, on_event=ignore_events, report=False)
    return defined(result.final["server"]["accuracy"])


def words(job: Job) -> str:
    """The settings that vary."""
    train = job.train
    return f"lr {train.lr:g}, epochs {train.epochs}, batch {train.batch_size}, {job.strategy.name}"


def tuned(how: str, path: Path, space: Any, seed: int, folder: Path) -> Found:
    """What `atoll tune` chooses in a third of the grid's runs."""
    runs = prod(len(values) for values in GRID.values()) // 3
    search = atoll.tune(path, space, folder / "search", trials=runs, seed=seed, workers=2)
    job = search.best
    row = next(row for row in search.rows if row["job_hash"] == job.hash)
    test = on_test_set(job, folder / "best")
    return Found(f"{how}, seed {seed}", float(row["accuracy"]), test, len(search.rows), words(job))


def compare(name: str, seeds: int, folder: Path) -> tuple[str, bool]:
    """A job's table, and whether every search among the grid's values came within a point by validation."""
    path = bad_job(name, folder)
    untuned = Job.load(path)
    grid, luckiest = grid_best(name, path, folder)
    before = validation_metrics(
        untuned, folder / "untuned", without_test_set(untuned, Population.of(untuned)), ignore_events
    )
    accuracy = defined(before["accuracy"])
    start = Found("as it is", accuracy, on_test_set(untuned, folder / "untuned-test"), 1, words(untuned))
    rows = [start, grid, luckiest]
    for how, space in (("tune, the grid's values", GRID), ("tune, nothing said", None)):
        for seed in range(1, seeds + 1):
            rows.append(tuned(how, path, space, seed, folder / f"{space is None}-{seed}"))
    head = f"{'':<34}{'kept back':>10}{'test':>8}{'points behind':>18}{'runs':>6}  settings"
    within = all(row.validation >= grid.validation - POINT for row in rows if row.how.startswith("tune, the"))
    return "\n".join([name, head, *(row.beside(grid) for row in rows)]), within


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", default="bbc-news,mnist")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    told = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.jobs.split(","):
            inside = Path(folder) / name
            inside.mkdir()
            with contextlib.redirect_stdout(sys.stderr):
                told.append(compare(name, options.seeds, inside))
    for text, within in told:
        print(f"\n{text}\nwithin a point by what is kept back: {'yes' if within else 'no'}")


if __name__ == "__main__":
    main()
