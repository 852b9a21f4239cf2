"""How a round grows with the cohort, the population and the dimension of the features.

A linear head of 10 classes on generated features, clients of 50 examples drawn from 20,000, one
epoch, batches of 10. Every point is a process of its own, run through Atoll's engine; the points
take turns, a repetition each. Tables of medians and most memory held, and a log-log plot with its
slope (least squares on the logarithms).

    python -m benchmarks.growth [--repeats 5] [--plot docs/growth.png]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

EXAMPLES, OFFERED, CLASSES, BATCH = 50, 20_000, 10, 10


@dataclass(frozen=True)
class Point:
    """One job: clients a round, clients in all, width of the features, rounds that are timed."""

    cohort: int
    population: int
    width: int
    rounds: int


SERIES = {
    "clients a round": [Point(k, 10_000, 384, max(4, min(40, 4000 // k))) for k in (10, 100, 1000, 10_000)],
    "clients in all": [Point(1000, n, 384, 8) for n in (1000, 10_000, 100_000, 1_000_000)],
    "width of the features": [Point(100, 10_000, w, 8) for w in (100, 1000, 10_000)],
}
VARIED = {"clients a round": "cohort", "clients in all": "population", "width of the features": "width"}


def run_point(point: Point) -> dict[str, float]:
    """In a process of its own: (median seconds a round, the most memory held in MB)."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from atoll.server.rounds.loop import run_rounds
    from atoll.server.rounds.start import start_or_resume
    from atoll.server.run.directory import RunDirectory
    from atoll.sim.engines.inline import InlineTransport
    from atoll.system.memory import own_peak_mb

    with tempfile.TemporaryDirectory() as folder:
        population = generated(point, Path(folder))
        carrier = InlineTransport.of(population)
        with RunDirectory.open(Path(folder) / "run", population.job, resume=False, force=False) as directory:
            run = start_or_resume(
                population.job, carrier, directory, lambda learner: None, lambda *step: None, resume=False
            )
            directory.commit()
            run_rounds(run)
    seconds = [line["seconds"] for line in run.state.log[1:]]
    return {"seconds": statistics.median(seconds), "memory": own_peak_mb()}


def generated(point: Point, folder: Path):  # type: ignore[no-untyped-def]
    """A population that draws its clients' examples from generated features in the cache."""
    import numpy as np
    import pyarrow as pa
    import torch

    from atoll.data.classification import example_keys
    from atoll.data.dataset import Dataset
    from atoll.job.job import Job
    from atoll.sim.population.assignment import SampledAssignment
    from atoll.sim.population.population import Population
    from benchmarks.generated import _backbone, _fill_cache

    # A wide table is a shorter one: what is offered takes 30 MB at most times two.
    offered = min(OFFERED, 8_000_000 // point.width)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, offered)
    means = 0.15 * rng.normal(size=(CLASSES, point.width))
    features = (means[labels] + rng.normal(size=(offered, point.width))).astype(np.float32)
    os.environ["ATOLL_CACHE"] = str(folder / "cache")
    job = Job.parse(
        {
            "name": "growth",
            "seed": 1,
            "task": {"name": "text-classification"},
            "data": {"source": "generated", "validation_fraction": 0.0},
            "backbone": {"name": str(_backbone(folder, point.width))},
            "train": {"batch_size": BATCH},
            "federation": {"clients": point.population, "cohort": point.cohort, "rounds": point.rounds + 1},
            "evaluate": {"every": 1_000_000},
        },
        origin="benchmark",
    )
    columns = {"text": [f"generated {i}" for i in range(offered)], "label": [f"{c:03d}" for c in labels]}
    table = Dataset(pa.table(columns))
    keys = example_keys(table)
    _fill_cache(job, keys, torch.from_numpy(features))
    row_order = np.argsort(labels, kind="stable")
    assignment = SampledAssignment(row_order, np.bincount(labels), point.population, EXAMPLES, 0.3, seed=1)
    return Population(job, table, table.select([]), keys, assignment)


def in_a_process(point: Point) -> dict[str, float]:
    """`run_point` in a new process."""
    command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(asdict(point))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def slope(xs: list[float], ys: list[float]) -> float:
    """Of log y over log x, by least squares."""
    us, vs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    middle = statistics.mean(us)
    across = sum((u - middle) * v for u, v in zip(us, vs, strict=True))
    return across / sum((u - middle) ** 2 for u in us)


def draw(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """One log-log picture a series, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 3.4), sharey=True)
    for axis, (name, points) in zip(axes, found.items(), strict=True):
        xs, ys = [x for x, _ in points], [y * 1e3 for _, y in points]
        axis.loglog(xs, ys, marker="o", color="#0b6e99")
        axis.set_xlabel(name)
        axis.set_title(f"slope {slope(xs, ys):.2f}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a round")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(run_point(Point(**json.loads(options.point)))))
        return
    outcomes: dict[Point, list[dict[str, float]]] = {}
    for _ in range(options.repeats):
        for points in SERIES.values():
            for point in points:
                outcomes.setdefault(point, []).append(in_a_process(point))
    print(f"{os.cpu_count()} cores, medians of {options.repeats} repetitions")
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, points in SERIES.items():
        print(f"\n{name:<24}{'ms a round':>12}{'clients/s':>12}{'most memory':>14}")
        for point in points:
            seconds = statistics.median(o["seconds"] for o in outcomes[point])
            memory = max(o["memory"] for o in outcomes[point])
            varied = getattr(point, VARIED[name])
            curves.setdefault(name, []).append((varied, seconds))
            print(f"{varied:<24,}{seconds * 1e3:>12.2f}{point.cohort / seconds:>12,.0f}{memory:>11,.0f} MB")
        xs, ys = zip(*curves[name], strict=True)
        print(f"slope on logarithms {slope(list(xs), list(ys)):.2f}")
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
