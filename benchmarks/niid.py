"""Cells of NIID-Bench on Fashion-MNIST: a CNN trained in full by clients whose classes are skewed.

    python -m benchmarks.niid [--only fedavg,scaffold,fedprox,fednova] [--seeds 1] [--rounds 50] [--out DIR]

The setting of Li et al. 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study": 10 clients,
all of them in each of 50 rounds, 10 local epochs of SGD in batches of 64 with a learning rate of .01 and
momentum .9, `atoll:lenet`, and each class dealt by Dirichlet(.5) among the clients that don't have a tenth of
all examples yet, again until every client has ten. A figure is the accuracy on Fashion-MNIST's test part, in
percent: the best of all rounds, which is what the published figures are, and the last round's. A cell takes
more than an hour on one core; with `--out` a run that was killed goes on. With several seeds a row has their
mean and its 95 % interval. It needs Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atoll import plugins
from atoll.data.dataset import Dataset
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.sweep.results import Estimate
from benchmarks.metrics import defined, mean_and_half

CLIENTS, ALPHA, LEAST = 10, 0.5, 10

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "scaffold": {"name": "scaffold"},
    "fedprox": {"name": "fedprox", "proximal_mu": 0.01},
    "fednova": {"name": "fednova"},
}

PUBLISHED = {"fedavg": "88.09 ± .29", "scaffold": "88.44 ± .25", "fedprox": "88.15", "fednova": "88.22"}
"""Of Flower's baseline niid_bench, a reproduction: means over seeds, the best of 50 rounds."""


@plugins.partition("niid-bench", summary="Dirichlet label skew, as NIID-Bench balances it")
def balanced_dirichlet(examples: Dataset, clients: int, draw: np.random.Generator) -> list[list[int]]:
    """Shares of each class are 0 for who has N / `clients` examples already; the rest is scaled to 1."""
    labels, hands = np.asarray(examples["label"]), [[0]]
    while min(map(len, hands)) < LEAST:
        hands = [[] for _ in range(clients)]
        for label in np.unique(labels):
            places = draw.permutation(np.flatnonzero(labels == label))
            shares = draw.dirichlet(np.full(clients, ALPHA))
            shares *= [len(hand) < len(labels) / clients for hand in hands]
            cuts = (np.cumsum(shares / shares.sum()) * len(places)).astype(int)[:-1]
            for hand, part in zip(hands, np.split(places, cuts), strict=True):
                hand.extend(part.tolist())
    return hands


def accuracies(strategy: dict[str, Any], seed: int, rounds: int, out: Path) -> list[float]:
    """After each round, in percent; goes on with a run that is in `out` already."""
    job = Job.parse(
        {
            "name": "niid",
            "seed": seed,
            "task": {"name": "image-classification"},
            "data": {
                "source": "fashion-mnist",
                "validation_fraction": 0.0,
                "partition": {"kind": "niid-bench"},
            },
            "backbone": {"name": "atoll:lenet", "weights": "random"},
            "tune": {"method": "full"},
            "train": {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "batch_size": 64, "epochs": 10},
            "federation": {"clients": CLIENTS, "rounds": rounds},
            "strategy": strategy,
        },
        origin="benchmark",
    )
    result = simulate(job, out, on_event=ignore_events, resume=out.exists(), report=False)
    return [100 * defined(one["metrics"]["accuracy"]) for one in result.rounds]


def main(arguments: Sequence[str]) -> None:
    """Print the table, a row a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.niid", description=__doc__)
    parser.add_argument("--only", default=",".join(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    sys.stdout.write(
        "| strategy | seed | rounds | best | last | published, best of 50 |\n|---|---|---|---|---|---|\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        out = chosen.out or Path(folder)
        for name in chosen.only.split(","):
            best, last = [], []
            for seed in range(1, chosen.seeds + 1):
                found = accuracies(STRATEGIES[name], seed, chosen.rounds, out / f"{name}-{seed}")
                best.append(max(found))
                last.append(found[-1])
                show(name, str(seed), chosen.rounds, f"{best[-1]:.2f}", f"{last[-1]:.2f}")
            if chosen.seeds > 1:
                means = (mean_and_half(Estimate.of(values), digits=2) for values in (best, last))
                show(name, f"1 to {chosen.seeds}", chosen.rounds, *means)


def show(name: str, seed: str, rounds: int, best: str, last: str) -> None:
    """Print a row."""
    sys.stdout.write(f"| {name} | {seed} | {rounds} | {best} | {last} | {PUBLISHED[name]} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
