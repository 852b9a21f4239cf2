"""What asynchronous strategies make of slow clients: accuracy on digits' test part after equal virtual time.

    python -m benchmarks.slow_clients [NAME …]

Ten clients whose classes are dealt by Dirichlet(0.3), a linear head on pixels, SGD at a learning rate of 0.3
in batches of 16. A local step takes the fastest client 1 virtual second, the slowest 10, the others in even
ratios between; a seed says who is how fast. All clients are at work at a time, with 100 local steps where
nothing else is said. A figure is the mean over five seeds with its 95 % t-interval.
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
from benchmarks.unlike_shards import SEEDS

CLIENTS, BATCH = 10, 16
SECONDS = (1000, 2000, 4000)
LATE = {"concurrency": CLIENTS}

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "fedavg": ({"name": "fedavg"}, {"rounds": 4}, 100),
    "fedavg, 20 steps": ({"name": "fedavg"}, {"rounds": 20}, 20),
    "fedbuff, 3 at a time": ({"name": "fedbuff"}, {**LATE, "cohort": 3, "rounds": 70}, 100),
    "fedasync": ({"name": "fedasync"}, {**LATE, "cohort": 1, "rounds": 200}, 100),
    "fedcompass, 20 to 100 steps": ({"name": "fedcompass"}, {**LATE, "rounds": 200}, None),
}
"""By name: the strategy, `[federation]` with more rounds than the time allows, and local steps."""


def profile(seed: int, folder: Path) -> str:
    """The clients' devices, as a file."""
    seconds = np.random.default_rng(seed).permutation(np.logspace(0, 1, CLIENTS))
    return written([BATCH / each for each in seconds.tolist()], folder)


def written(speeds: Sequence[float], folder: Path) -> str:
    """A file of devices, which train so many examples a second, client by client."""
    rows = [f"{name},{speed!r}" for name, speed in zip(client_names(len(speeds)), speeds, strict=True)]
    (folder / "devices.csv").write_text("\n".join(["client,examples_per_second", *rows]))
    return str(folder / "devices.csv")


def accuracies(name: str, seed: int) -> list[float]:
    """After each of `SECONDS`."""
    strategy, federation, steps = WAYS[name]
    train = {"lr": 0.3, "batch_size": BATCH} | ({} if steps is None else {"steps": steps})
    with tempfile.TemporaryDirectory() as folder:
        table = {
            "name": "slow",
            "seed": seed,
            "task": {"name": "image-classification"},
            "data": {
                "source": "digits",
                "classes": [str(digit) for digit in range(10)],
                "partition": {"kind": "dirichlet", "alpha": 0.3, "min_examples": BATCH + 8},
                "validation_fraction": 0,
            },
            "backbone": {"name": "raw:pixels", "image_size": 8},
            "train": train,
            "federation": {"clients": CLIENTS, "devices": profile(seed, Path(folder))} | federation,
            "strategy": strategy,
        }
        job = Job.parse(table, origin="benchmark")
        lines = simulate(job, Path(folder) / "run", on_event=ignore_events, report=False).rounds
    if lines[-1]["simulated"]["elapsed"] < SECONDS[-1] * (1 - 1e-9):
        raise SystemExit(f"{name}: {len(lines)} rounds end after {lines[-1]['simulated']['elapsed']:.0f} s")
    by_then = [
        [line for line in lines if line["simulated"]["elapsed"] <= end * (1 + 1e-9)] for end in SECONDS
    ]
    return [defined(done[-1]["metrics"]["accuracy"]) for done in by_then]


def main(names: Sequence[str]) -> None:
    """Print the table, a row a strategy."""
    columns = [f"{seconds} s" for seconds in SECONDS]
    sys.stdout.write(f"| strategy | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n")
    for name in names or WAYS:
        found = [accuracies(name, seed) for seed in SEEDS]
        cells = [in_percent(after) for after in zip(*found, strict=True)]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
