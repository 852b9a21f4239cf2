"""Closed-form heads on random features: accuracy on digits' test part by the number of units and the ridge.

    python -m benchmarks.random_features

Six clients whose classes are dealt by Dirichlet(0.1), raw pixels, one round in which nothing is trained. A
figure is the mean over five seeds, which also draw the layer. `none` is the linear head.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from benchmarks.metrics import defined

SEEDS = (1, 2, 3, 4, 5)
UNITS = (None, 64, 256, 1024)
RIDGES = (1.0, 0.1, 0.01)


def accuracy(tune: dict[str, Any], seed: int) -> float:
    """Of the head that the one round forms, in percent."""
    job = Job.parse(
        {
            "name": "random-features", "seed": seed,
            "task": {"name": "image-classification"},
            "data": {
                "source": "digits", "validation_fraction": 0.0,
                "partition": {"kind": "dirichlet", "alpha": 0.1},
            },
            "backbone": {"name": "raw:pixels", "image_size": 8},
            "federation": {"clients": 6, "rounds": 1},
            "tune": tune,
        },
        origin="benchmark",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(job, Path(folder) / "run", on_event=ignore_events, report=False)
    return 100 * defined(result.final["server"]["accuracy"])


def main() -> None:
    """Print the table, a row a number of units, a column a closed form with its ridge."""
    forms = [(kind, ridge) for kind in ("ridge", "gaussian") for ridge in RIDGES]
    heads = " | ".join(f"`{kind}`, ridge {ridge:g}" for kind, ridge in forms)
    sys.stdout.write(f"| `hidden` | {heads} |\n|---|{'---|' * len(forms)}\n")
    for units in UNITS:
        cells = []
        for kind, ridge in forms:
            tune = {"head_init": kind, "ridge": ridge} | ({} if units is None else {"hidden": units})
            cells.append(f"{statistics.mean(accuracy(tune, seed) for seed in SEEDS):.1f}")
        sys.stdout.write(f"| {units or 'none'} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
