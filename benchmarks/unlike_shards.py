"""What strategies make of unlike shards: accuracy on digits' test part after few rounds and after many.

    python -m benchmarks.unlike_shards [NAME …]

Ten clients whose classes are dealt by Dirichlet(0.1), a linear head on pixels, 5 local epochs of SGD at a
learning rate of 1 in batches of 16; all of them in every round, or three. A figure is the mean over five
seeds with its 95 % t-interval; a seed's data, cohorts and batches are the same for every strategy.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from benchmarks.metrics import defined, in_percent

SEEDS = (1, 2, 3, 4, 5)
ROUNDS = (10, 30)
COHORTS = (10, 3)

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "fedprox": {"name": "fedprox"},
    "fednova": {"name": "fednova"},
    "fedexp": {"name": "fedexp"},
    "scaffold, option 2": {"name": "scaffold"},
    "scaffold, option 1": {"name": "scaffold", "options": {"option": 1}},
    "feddyn, alpha 0.01": {"name": "feddyn"},
    "feddyn, alpha 0.1": {"name": "feddyn", "options": {"alpha": 0.1}},
}


def accuracies(strategy: dict[str, Any], cohort: int, seed: int) -> list[float]:
    """After each of `ROUNDS`."""
    job = Job.parse(
        {
            "name": "unlike",
            "seed": seed,
            "task": {"name": "image-classification"},
            "data": {
                "source": "digits",
                "classes": [str(digit) for digit in range(10)],
                "partition": {"kind": "dirichlet", "alpha": 0.1},
            },
            "backbone": {"name": "raw:pixels", "image_size": 8},
            "train": {"lr": 1.0, "batch_size": 16, "epochs": 5},
            "federation": {"clients": 10, "cohort": cohort, "rounds": max(ROUNDS)},
            "strategy": strategy,
        },
        origin="benchmark",
    )
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(job, Path(folder) / "run", on_event=ignore_events, report=False)
    return [defined(result.rounds[round - 1]["metrics"]["accuracy"]) for round in ROUNDS]


def main(names: Sequence[str]) -> None:
    """Print the table, a row a strategy."""
    columns = [f"{cohort} of 10, round {round}" for cohort in COHORTS for round in ROUNDS]
    sys.stdout.write(f"| strategy | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n")
    for name in names or STRATEGIES:
        cells = []
        for cohort in COHORTS:
            found = [accuracies(STRATEGIES[name], cohort, seed) for seed in SEEDS]
            cells += [in_percent(after) for after in zip(*found, strict=True)]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
