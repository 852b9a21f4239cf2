"""Closed-form heads under example-level privacy beside the same head trained by private SGD, on digits.

Whole runs of the real code, with noise from the system's entropy: test accuracy over `--seeds` runs each,
mean and least to greatest. Private SGD gets the best of three learning rates, which costs no epsilon here and
would in earnest; the closed forms have nothing to choose but `feature_norm`, the norm of all features.

    python -m benchmarks.private_closed_form [--clients 2] [--seeds 5]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from benchmarks.metrics import defined

EPSILONS = (0.5, 1.0, 3.0, 8.0)
DELTA = 1e-4
RATES = (0.5, 2.0, 8.0)
ROUNDS = 10
FEATURE_NORM = 1.0
"""`raw:pixels` scales every picture to this norm."""


def accuracy(clients: int, seed: int, **tables: Any) -> float:
    """Of one run on the server's test set."""
    table: dict[str, Any] = {
        "name": "private-closed-form", "seed": seed,
        "task": {"name": "image-classification"},
        "data": {"source": "digits", "validation_fraction": 0.0},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "federation": {"clients": clients, "rounds": tables.pop("rounds", 1)},
    }  # fmt: skip
    job = Job.parse(table | tables, origin="benchmark")
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(job, Path(folder) / "run", on_event=ignore_events, report=False)
    return defined(result.final["server"]["accuracy"])


KINDS = ("ridge", "prototype", "gaussian")


def closed_form(kind: str, epsilon: float | None, clients: int, seed: int) -> float:
    """Of a head in closed form; without epsilon without noise."""
    if epsilon is None:
        return accuracy(clients, seed, tune={"head_init": kind})
    privacy = {"unit": "example", "epsilon": epsilon, "delta": DELTA}
    return accuracy(clients, seed, tune={"head_init": kind, "feature_norm": FEATURE_NORM}, privacy=privacy)


def private_sgd(epsilon: float, lr: float, clients: int, seed: int) -> float:
    """Of a head trained by DP-SGD, one step of an eighth of the examples after the other."""
    privacy = {
        "unit": "example", "epsilon": epsilon, "delta": DELTA, "sampling_rate": 0.125, "clipping_norm": 1.0,
    }  # fmt: skip
    train = {"lr": lr, "batch_size": 1400 // clients // 8}
    return accuracy(clients, seed, rounds=ROUNDS, privacy=privacy, train=train)


def spread(found: list[float]) -> str:
    """Mean and range, in percent."""
    return f"{100 * np.mean(found):5.1f} ({100 * min(found):.1f} to {100 * max(found):.1f})"


def main() -> None:
    """Print a line for each epsilon."""
    parser = argparse.ArgumentParser(description="Private heads in closed form.")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    seeds = range(1, given.seeds + 1)
    plain = [spread([closed_form(kind, None, given.clients, s) for s in seeds]) for kind in KINDS]
    print(f"digits, {given.clients} clients, delta {DELTA:g}; test accuracy in %, mean (least to greatest)")
    print("without noise: " + ", ".join(map(" ".join, zip(KINDS, plain, strict=True))))
    print("epsilon ", *KINDS, "private SGD", sep="  ")
    for epsilon in EPSILONS:
        heads = [spread([closed_form(kind, epsilon, given.clients, s) for s in seeds]) for kind in KINDS]
        trained = [[private_sgd(epsilon, lr, given.clients, s) for s in seeds] for lr in RATES]
        print(f"{epsilon:7g}", *heads, spread(max(trained, key=np.mean)), sep="  ", flush=True)


if __name__ == "__main__":
    main()
