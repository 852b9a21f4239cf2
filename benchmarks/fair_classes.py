"""The worst class under strategies that are fair to clients: three classes of Fashion-MNIST, a client each.

    python -m benchmarks.fair_classes [NAME …]

The setting of Mohri et al. 2019 and Li et al. 2020: labels 0, 2 and 6 (T-shirt, pullover, shirt), logistic
regression on pixels, one client a class, and in every round one step of each client over all its 6,000
examples. Smaller than theirs: pictures of 14 x 14 scaled to length 1, a learning rate of 2, 300 rounds, and
the last model. A figure is the accuracy on a class of the test part, in percent. Nothing is drawn, so there
is one run of each strategy. It needs Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from atoll.datasets.registry import SOURCES
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.server.rounds.run_state import Run
from atoll.server.run.result import Baselines
from atoll.sim.engines.engine import simulate

CLASSES = ("T-shirt", "Pullover", "Shirt")
ROUNDS = 300

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "qffl, q 1": {"name": "qffl", "options": {"q": 1.0}},
    "qffl, q 5": {"name": "qffl", "options": {"q": 5.0}},
    "afl, lambda_lr 0.1": {"name": "afl"},
}


def write_sources(folder: Path) -> None:
    """The three classes as Parquet, with a column that says whose each training example is."""
    for part, table in SOURCES["fashion-mnist"].decode(True, None).items():
        chosen = table.filter(pc.is_in(table["label"], pa.array(CLASSES)))
        pq.write_table(chosen.append_column("client", chosen["label"]), folder / f"{part}.parquet")


def class_accuracies(strategy: dict[str, Any], sources: Path, rounds: int = ROUNDS) -> list[float]:
    """Of each of `CLASSES`, after the last round."""
    job = Job.parse(
        {
            "name": "fair",
            "seed": 1,
            "task": {"name": "image-classification"},
            "data": {
                "source": str(sources / "train.parquet"),
                "test": str(sources / "test.parquet"),
                "validation_fraction": 0.0,
                "partition": {"kind": "natural", "by": "client"},
            },
            "backbone": {"name": "raw:pixels", "image_size": 14},
            "train": {"lr": 2.0, "batch_size": 6000},
            "federation": {"clients": len(CLASSES), "rounds": rounds},
            "strategy": strategy,
            "evaluate": {"every": rounds},
        },
        origin="benchmark",
    )
    found: list[float] = []

    def measure(run: Run) -> tuple[Baselines, list[str]]:
        learner, shard = run.state.learner, run.setup.test
        assert shard is not None
        names = learner.data_info["classes"]
        for name in CLASSES:
            rows = (shard.targets == names.index(name)).nonzero().flatten().tolist()
            states = learner.evaluate(run.state.tensors, shard.select(rows))
            found.append(float(learner.compute(states)["accuracy"] or 0.0))
        return {}, []

    with tempfile.TemporaryDirectory() as folder:
        simulate(job, Path(folder) / "run", on_event=ignore_events, report=False, baselines=measure)
    return found


def main(names: Sequence[str]) -> None:
    """Print the table, a row a strategy."""
    sys.stdout.write(f"| strategy | {' | '.join(CLASSES)} | worst | mean |\n|---|{'---|' * 5}\n")
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        for name in names or STRATEGIES:
            found = [100 * value for value in class_accuracies(STRATEGIES[name], Path(folder))]
            cells = [f"{value:.1f}" for value in (*found, min(found), fmean(found))]
            sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
