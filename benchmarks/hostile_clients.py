"""What merges make of hostile clients: accuracy on digits' test part under each attack, and the worst of all.

    python -m benchmarks.hostile_clients [NAME …]

Twenty clients whose classes are dealt by Dirichlet(0.5), four of them hostile, all in each of 25 rounds: a
linear head on pixels, 5 local epochs of SGD at a learning rate of 8 in batches of 16. A figure is the mean
over three seeds; a seed's data, hostile clients and batches are the same for every strategy. `worst` is
a row's least figure.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from benchmarks.metrics import defined

SEEDS = (1, 2, 3)
CLIENTS, HOSTILE, ROUNDS = 20, 4, 25

ATTACKS: dict[str, dict[str, Any]] = {
    "none": {},
    "label flip": {"kind": "label-flip"},
    "sign flip": {"kind": "sign-flip"},
    "sign flip x 10": {"kind": "sign-flip", "scale": 10.0},
    "inner product x 10": {"kind": "inner-product", "scale": 10.0},
    "ALIE 1.5": {"kind": "alie"},
    "min-max": {"kind": "min-max"},
    "mimic": {"kind": "mimic"},
    "Gaussian x 100": {"kind": "gaussian", "scale": 100.0},
    "backdoor x 10": {"kind": "backdoor", "victim": "1", "target": "7", "scale": 10.0},
    "free rider": {"kind": "free-rider"},
}

HOLDS = {"hostile": HOSTILE}
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "coordinate-median": {"name": "coordinate-median", "options": HOLDS},
    "trimmed-mean": {"name": "trimmed-mean", "options": HOLDS},
    "geometric-median": {"name": "geometric-median", "options": HOLDS},
    "multi-krum": {"name": "multi-krum", "options": HOLDS},
    "bulyan": {"name": "bulyan", "options": HOLDS},
    "centered-clipping": {"name": "centered-clipping", "options": HOLDS},
    "norm-bound": {"name": "norm-bound", "options": HOLDS},
    "trimmed-mean, mixing": {"name": "trimmed-mean", "options": HOLDS | {"mixing": True}},
    "geometric-median, mixing": {"name": "geometric-median", "options": HOLDS | {"mixing": True}},
    "flanders": {"name": "flanders", "options": HOLDS},
    "fltrust": {"name": "fltrust", "options": {"root": "client-0000"}},
    "centered-clipping, mixing": {"name": "centered-clipping", "options": HOLDS | {"mixing": True}},
}


def accuracy(strategy: dict[str, Any], attack: dict[str, Any], seed: int) -> float:
    """After the last round."""
    job = Job.parse(
        {
            "name": "hostile",
            "seed": seed,
            "task": {"name": "image-classification"},
            "data": {
                "source": "digits",
                "classes": [str(digit) for digit in range(10)],
                "partition": {"kind": "dirichlet", "alpha": 0.5},
            },
            "backbone": {"name": "raw:pixels", "image_size": 8},
            "train": {"lr": 8.0, "batch_size": 16, "epochs": 5},
            "federation": {"clients": CLIENTS, "rounds": ROUNDS, "quorum": 1.0},
            "strategy": strategy,
            "attack": {"clients": HOSTILE} | attack if attack else {},
        },
        origin="benchmark",
    )
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(job, Path(folder) / "run", on_event=ignore_events, report=False)
    return defined(result.rounds[-1]["metrics"]["accuracy"])


def main(names: Sequence[str]) -> None:
    """Print the table, a row a strategy, a column an attack."""
    columns = [*ATTACKS, "**worst**"]
    sys.stdout.write(f"| rule | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n")
    for name in names or STRATEGIES:
        found = [
            statistics.mean(100 * accuracy(STRATEGIES[name], attack, seed) for seed in SEEDS)
            for attack in ATTACKS.values()
        ]
        cells = " | ".join(f"{percent:.1f}" for percent in [*found, min(found)])
        sys.stdout.write(f"| `{name}` | {cells} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
