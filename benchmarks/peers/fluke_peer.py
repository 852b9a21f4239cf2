"""fluke: its FedAVG (CentralizedFL) with its own server, clients and FastDataLoader.

Models stay in memory, and all evaluation is off. Its parallel engine asks for at least two GPUs,
so on two cores fluke trains one client after the other.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver

from benchmarks.networks import accuracy, network_of
from benchmarks.workload import Array, Outcome, Workload, seconds_between


class Stamps(FederationObserver):
    """Notes when each round begins and ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start_round(self, round: int, global_model: Any) -> None:
        if not self.times:
            self.times.append(time.perf_counter())

    def end_round(self, round: int) -> None:
        self.times.append(time.perf_counter())


def loader_of(inputs: Array, targets: Array, workload: Workload) -> FastDataLoader:
    """One client's shuffled batches; a last batch of one example counts too."""
    return FastDataLoader(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        num_labels=workload.classes,
        batch_size=workload.batch,
        shuffle=True,
        skip_singleton=False,
    )


def simulate(path: Path) -> Outcome:
    """(seconds of every round, accuracy)."""
    workload = Workload.load(path)
    environment = FlukeENV()
    environment.set_seed(1)
    environment.set_device("cpu")
    environment.set_inmemory(True)
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    loaders = [loader_of(*workload.client(place), workload) for place in range(workload.clients)]
    data = DummyDataContainer(loaders, [None] * workload.clients, None, workload.classes)
    network = network_of(workload)
    hyper_params = DDict(
        model=network,
        client=DDict(
            batch_size=workload.batch,
            local_epochs=1,
            loss="CrossEntropyLoss",
            optimizer=DDict(name="SGD", lr=workload.lr),
            scheduler=DDict(step_size=1, gamma=1),
            persistency=False,
        ),
        server=DDict(weighted=True),
    )
    algorithm = FedAVG(workload.clients, DataSplitter(data), hyper_params)
    stamps = Stamps()
    algorithm.set_callbacks([stamps])
    algorithm.run(workload.rounds, workload.cohort / workload.clients, finalize=False)
    return seconds_between(stamps.times), accuracy(algorithm.server.model, workload)
