"""What a rule for who takes part gains: accuracy on digits' test part by rounds and by virtual time.

    python -m benchmarks.who_takes_part [NAME …]

Thirty clients whose classes are dealt by Dirichlet(0.3), so that their sizes differ as well, three of them in
a round; a linear head on pixels, one local epoch of SGD at a learning rate of 1 in batches of 8. Clients
compute 1 to 10 examples in a virtual second, which Oort is told; a seed says who is how fast. "Worst tenth"
is the mean accuracy of the worst tenth of the clients on a fifth of their examples, which they keep back,
after the last round. A figure is the mean over twenty seeds with its 95 % t-interval.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import client_names
from benchmarks.metrics import defined, in_percent
from benchmarks.slow_clients import written

SEEDS = range(1, 21)
CLIENTS, COHORT = 30, 3
ROUNDS = (10, 30, 100)
SECONDS = (300, 1000)

RULES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "by-size": {"selection": "by-size"},
    "power-of-choice, 9 candidates": {"selection": "power-of-choice", "candidates": 9},
    "oort": {"selection": "oort"},
}


def measured(rule: dict[str, Any], seed: int) -> list[float]:
    """Accuracies after each of `ROUNDS` and after each of `SECONDS`, and the worst tenth's."""
    names = client_names(CLIENTS)
    speeds = np.random.default_rng(seed).permutation(np.logspace(0, 1, CLIENTS)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        oort = {"oort": {"speeds": dict(zip(names, speeds, strict=True))}} if "oort" in rule.values() else {}
        job = Job.parse(
            {
                "name": "who",
                "seed": seed,
                "task": {"name": "image-classification"},
                "data": {
                    "source": "digits",
                    "classes": [str(digit) for digit in range(10)],
                    "partition": {"kind": "dirichlet", "alpha": 0.3, "min_examples": 10},
                    "validation_fraction": 0.2,
                },
                "backbone": {"name": "raw:pixels", "image_size": 8},
                "train": {"lr": 1.0, "batch_size": 8},
                "federation": {"clients": CLIENTS, "cohort": COHORT, "rounds": ROUNDS[-1]}
                | {"devices": written(speeds, Path(folder))} | rule | oort,
            },
            origin="benchmark",
        )  # fmt: skip
        result = simulate(job, Path(folder) / "run", on_event=ignore_events, report=False)
    lines = result.rounds
    if lines[-1]["simulated"]["elapsed"] < SECONDS[-1]:
        raise SystemExit(f"{len(lines)} rounds end after {lines[-1]['simulated']['elapsed']:.0f} s")
    done = [lines[round - 1] for round in ROUNDS]
    done += [[line for line in lines if line["simulated"]["elapsed"] <= end][-1] for end in SECONDS]
    clients = sorted(
        defined(client["accuracy"]) for client in result.final["clients"].values() if client["examples"]
    )
    worst = clients[: max(1, len(clients) // 10)]
    return [*(defined(line["metrics"]["accuracy"]) for line in done), sum(worst) / len(worst)]


def main(names: Sequence[str]) -> None:
    """Print the table, a row a rule."""
    columns = [
        *(f"round {round}" for round in ROUNDS),
        *(f"{seconds} s" for seconds in SECONDS),
        "worst tenth",
    ]
    sys.stdout.write(f"| `selection` | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n")
    for name in names or RULES:
        found = [measured(RULES[name], seed) for seed in SEEDS]
        cells = [in_percent(values) for values in zip(*found, strict=True)]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
