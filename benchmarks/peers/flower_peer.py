"""Flower's simulation engine (Ray), FedAvg, the Message API, as its documentation would do it.

One actor a core, each with one torch thread; no evaluation. Each actor reads the data once and
keeps it: a ClientApp that holds the data itself would be sent with it for every client.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.networks import accuracy, network_of, train_plainly
from benchmarks.workload import Outcome, Workload, seconds_between


@functools.cache
def loaded(path: str) -> tuple[Workload, torch.nn.Module]:
    """The data and a network to train, once in a process."""
    torch.set_num_threads(1)
    workload = Workload.load(Path(path))
    return workload, network_of(workload)


def train(message: Message, context: Context) -> Message:
    """One client's local epoch."""
    workload, network = loaded(str(message.content.config_records["config"]["workload"]))
    inputs, targets = workload.client(int(context.node_config["partition-id"]))
    network.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    own = torch.from_numpy(inputs), torch.from_numpy(targets)
    train_plainly(network, *own, workload, np.random.default_rng())
    content = RecordDict(
        {
            "arrays": ArrayRecord(network.state_dict()),
            "metrics": MetricRecord({"num-examples": len(targets)}),
        }
    )
    return Message(content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that notes when each round begins and when its merge is done."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.times: list[float] = []

    def configure_train(self, *arguments: Any) -> Any:
        if not self.times:
            self.times.append(time.perf_counter())
        return super().configure_train(*arguments)

    def aggregate_train(self, *arguments: Any) -> Any:
        merged = super().aggregate_train(*arguments)
        self.times.append(time.perf_counter())
        return merged


def wait_for_nodes(grid: Grid, count: int) -> None:
    """Return once all clients are known: the first rounds would otherwise draw from fewer."""
    while len(list(grid.get_node_ids())) < count:
        time.sleep(0.1)


def simulate(path: Path) -> Outcome:
    """(seconds of every round, accuracy)."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    workload = Workload.load(path)
    network = network_of(workload)
    strategy = Timed(
        fraction_train=workload.cohort / workload.clients,
        fraction_evaluate=0.0,
        min_available_nodes=workload.clients,
    )
    client, server = ClientApp(), ServerApp()
    client.train()(train)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        wait_for_nodes(grid, workload.clients)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(network.state_dict()),
            num_rounds=workload.rounds,
            train_config=ConfigRecord({"workload": str(path)}),
        )
        network.load_state_dict(result.arrays.to_torch_state_dict())

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    run_simulation(
        server,
        client,
        num_supernodes=workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": os.cpu_count() or 1, **quiet},
        },
    )
    return seconds_between(strategy.times), accuracy(network, workload)
