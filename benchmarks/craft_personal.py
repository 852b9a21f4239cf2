"""What few examples and skewed clients ask for: heads in closed form, and models of clients' own.

    python -m benchmarks.craft_personal [CASE …] [--seeds 5]        # few, skewed, network

`few`: five MNIST digits of each class in all, one at each of 5 clients, on MobileNetV2's features; accuracy
on the test part. `skewed`: the same features over 10 clients with two of the ten digits each; the mean over
clients of accuracy on what each keeps back, with the model that it would use. `network`: the same of a
small vision transformer, from nothing, which takes an hour. A seed deals the data anew and starts the model
anew. Intervals are Student's, 95 % over seeds; "gain" is the mean of the differences to the first row's run
of the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from atoll.report.run_result import RunResult
from benchmarks.craft import Case, Table, merged, network, play
from benchmarks.metrics import defined

TWO_CLASSES: Table = {
    "partition": {"kind": "pathological", "classes_per_client": 2},
    "classes": tuple("0123456789"),
    "validation_fraction": 0.3,
}


def few(folder: Path) -> Table:
    """One MNIST digit of each class at each of 5 clients."""
    return {
        "data": {"source": "mnist-5k", "shots": 1},
        "backbone": {"name": "torchvision:mobilenet_v2", "image_size": 64},
        "train": {"lr": 0.01, "batch_size": 10, "optimizer": "adam"},
        "federation": {"clients": 5, "rounds": 40},
    }


def skewed(folder: Path) -> Table:
    """MNIST's digits on features, of which a client has two classes."""
    data = {"source": "mnist-5k", **TWO_CLASSES}
    return merged(few(folder), {"data": {"shots": 20}}, {"data": data, "federation": {"clients": 10}})


def transformer(folder: Path) -> Table:
    """The transformer of benchmarks.craft on digits, of which a client has two classes."""
    own = {"data": {"source": "digits", "shots": 20, **TWO_CLASSES}, "federation": {"rounds": 30}}
    return merged({k: v for k, v in network(folder).items() if k != "data"}, own)


def formed(kind: str, rounds: int) -> Table:
    """A head in closed form, and rounds of training after it."""
    return {"tune": {"head_init": kind}, "federation": {"rounds": 1 + rounds}}


def at_the_clients(result: RunResult) -> float:
    """The mean over clients of what each measured, after its own steps where it took any."""
    clients = [c for c in result.final["clients"].values() if c["examples"]]
    return sum(defined(c.get("adapted_accuracy", c["accuracy"])) for c in clients) / len(clients)


ADAPTED: Mapping[str, Table] = {
    "one model, 20 steps": {"evaluate": {"adapt": 20}},
    "reptile, 20 steps": {"strategy": {"name": "reptile"}, "evaluate": {"adapt": 20}},
}

CASES = {
    "few": Case(
        "accuracy",
        few,
        {
            "head by SGD (Adam)": {},
            "prototype": formed("prototype", 0),
            "ridge": formed("ridge", 0),
            "prototype, then SGD": formed("prototype", 40),
            "ridge, then SGD": formed("ridge", 40),
        },
    ),
    "skewed": Case(
        "at clients",
        skewed,
        {
            "one model": {},
            "mixture, pull 0.1": {"personal": {"keep": "mixture"}},
            "mixture, pull 1": {"personal": {"keep": "mixture", "pull": 1.0}},
            **ADAPTED,
        },
        at_the_clients,
    ),
    "network": Case(
        "at clients",
        transformer,
        {
            "one model": {},
            "own head": {"personal": {"keep": "head"}},
            "own norms": {"personal": {"keep": "norms"}},
            "mixture, pull 0.1": {"personal": {"keep": "mixture"}},
            **ADAPTED,
        },
        at_the_clients,
    ),
}


if __name__ == "__main__":
    play(CASES, __doc__)
