"""Where a strategy is taken instead of FedAvg, and what it gains there, over seeds.

    python -m benchmarks.which_strategy [CASE …] [--seeds 5]        # noisy, long, sparse, drift, …

`noisy`: twenty clients of few classes each (digits, Dirichlet 0.1), two of them in a round. `long`: eight
clients of MNIST's digits that take 100 steps of AdamW in each of 5 rounds, LeNet-5 from nothing. `sparse`:
ten shops' customers, SASRec from nothing, whose items' embeddings move only where they are taken. `drift`:
ten clients of few classes each (MNIST, Dirichlet 0.1), 5 local epochs, LeNet-5 from nothing. `votes`:
twenty clients (digits, Dirichlet 1), six of which have every label turned round; `few-votes`: the same with
Dirichlet 0.1. A seed deals the data anew and starts the model anew. Intervals are Student's, 95 % over
seeds; "gain" is the mean of the differences to FedAvg's run of the same seed, "bytes up" of one client in
one round.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.craft import Case, Table, play

DIGITS = tuple("0123456789")
LENET: Table = {"backbone": {"name": "atoll:lenet", "weights": "random"}, "tune": {"method": "full"}}


def dealt(alpha: float) -> dict[str, Any]:
    """`[data]` of ten classes, dealt by Dirichlet."""
    return {"classes": DIGITS, "partition": {"kind": "dirichlet", "alpha": alpha}}


def pixels(clients: int, rounds: int, alpha: float = 0.1, lr: float = 0.2, **federation: Any) -> Table:
    """A linear head on digits of 8 x 8 pixels."""
    return {
        "data": {"source": "digits", **dealt(alpha)},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "train": {"lr": lr, "batch_size": 16},
        "federation": {"clients": clients, "rounds": rounds, **federation},
    }


def noisy(folder: Path) -> Table:
    """Two of twenty clients in a round."""
    return pixels(20, 60, cohort=2)


def long(folder: Path) -> Table:
    """Hundreds of local steps by an optimizer of its own, few rounds."""
    return LENET | {
        "data": {"source": "mnist-5k", **dealt(0.3)},
        "train": {"optimizer": "adamw", "lr": 0.001, "weight_decay": 0.1, "batch_size": 32, "steps": 100},
        "federation": {"clients": 8, "rounds": 5},
    }


def sparse(folder: Path) -> Table:
    """What shops' customers take next: an item's embedding moves only where somebody has taken it."""
    return {
        "task": {"name": "recommendation", "options": {"length": 20}},
        "data": {"source": "generated-shop", "partition": {"kind": "natural", "by": "shop"}},
        "backbone": {"name": "atoll:sasrec", "weights": "random"},
        "tune": {"method": "full"},
        "train": {"lr": 1.0, "batch_size": 16},
        "federation": {"clients": 10, "rounds": 10},
    }


def drift(folder: Path) -> Table:
    """Clients whose networks go their own ways."""
    return LENET | {
        "data": {"source": "mnist-5k", "shots": 30, **dealt(0.1)},
        "train": {"lr": 0.05, "batch_size": 10, "epochs": 5},
        "federation": {"clients": 10, "rounds": 10},
    }


def votes(folder: Path) -> Table:
    """Six of twenty clients, of all classes, learn the last class for the first."""
    return pixels(20, 60, alpha=1.0, lr=1.0) | {"attack": {"kind": "label-flip", "clients": 6}}


def few(folder: Path) -> Table:
    """The same, with few classes at a client, where no class has a majority."""
    return pixels(20, 60, alpha=0.1, lr=1.0) | {"attack": {"kind": "label-flip", "clients": 6}}


def strategy(name: str, **keys: Any) -> Table:
    """Changes of `[strategy]`."""
    return {"strategy": {"name": name, **keys}}


SIGNS: Table = {"federation": {"compression": "sign", "error_feedback": False}}
BY_SIGNS = {"fedavg": {}, "signsgd, lr 0.1": SIGNS | strategy("signsgd", lr=0.1)}

CASES = {
    "noisy": Case("accuracy", noisy, {"fedavg": {}, "fedavgm": strategy("fedavgm")}),
    "long": Case("accuracy", long, {"fedavg": {}, "diloco": strategy("diloco")}),
    "sparse": Case(
        "ndcg",
        sparse,
        {
            "fedavg": {},
            "fedadam, lr 0.03": strategy("fedadam", lr=0.03),
            "fedyogi, lr 0.03": strategy("fedyogi", lr=0.03),
            "fedadagrad, lr 0.03": strategy("fedadagrad", lr=0.03),
        },
    ),
    "drift": Case(
        "accuracy",
        drift,
        {
            "fedavg": {},
            "moon, mu 1": strategy("moon"),
            "moon, mu 5": strategy("moon", options={"mu": 5.0}),
            "scaffold": strategy("scaffold"),
        },
    ),
    "votes": Case("accuracy", votes, BY_SIGNS),
    "few-votes": Case("accuracy", few, BY_SIGNS),
}


if __name__ == "__main__":
    play(CASES, __doc__)
