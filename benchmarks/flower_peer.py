"""The head-tuning workload on Flower's own simulation engine, as its documentation would do it."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


def simulate(data: Any, rounds: int) -> tuple[list[float], float]:
    """(seconds of every round, accuracy at the end) with two Ray actors."""
    from benchmarks.head_tuning import CLASSES, CLIENTS, COHORT, EXAMPLES, WIDTH, train_plainly

    logging.getLogger("flwr").setLevel(logging.ERROR)
    client, server = ClientApp(), ServerApp()
    features, targets = data.features.numpy(), data.targets.numpy()
    stamps: list[float] = []
    final: list[dict[str, torch.Tensor]] = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        place = int(context.node_config["partition-id"])
        model = torch.nn.Linear(WIDTH, CLASSES)
        state = message.content.array_records["arrays"].to_torch_state_dict()
        own = torch.from_numpy(features[place]), torch.from_numpy(targets[place])
        train_plainly(model, state, *own, np.random.default_rng())
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": EXAMPLES}),
            }
        )
        return Message(content, reply_to=message)

    class Timed(FedAvg):
        """FedAvg that notes when each round begins and ends."""

        def configure_train(self, *arguments: Any) -> Any:
            stamps.append(time.perf_counter())
            return super().configure_train(*arguments)

        def aggregate_train(self, *arguments: Any) -> Any:
            merged = super().aggregate_train(*arguments)
            stamps.append(time.perf_counter())
            return merged

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=COHORT / CLIENTS, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        first = ArrayRecord(torch.nn.Linear(WIDTH, CLASSES).state_dict())
        result = strategy.start(grid=grid, initial_arrays=first, num_rounds=rounds)
        final.append(result.arrays.to_torch_state_dict())

    run_simulation(
        server,
        client,
        num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "log_to_driver": False, "logging_level": logging.ERROR},
        },
    )
    seconds = [end - begin for begin, end in zip(stamps[::2], stamps[1::2], strict=True)]
    return seconds, data.accuracy(final[0]["weight"], final[0]["bias"])
