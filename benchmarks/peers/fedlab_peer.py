"""FedLab: its standalone pipeline with the FedAvg handler and the serial trainer.

The serial trainer in one process is FedLab's way of simulating on one machine. What it asks of a
data set is a loader a client; a DataLoader collates example by example, so the loader here hands
out shuffled batches by index, which is faster. The published FedAvg weighs all clients alike; its
aggregator takes weights, which is what the handler here gives it. The progress bar is switched off.
"""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from fedlab.contrib.algorithm.fedavg import FedAvgSerialClientTrainer, FedAvgServerHandler
from fedlab.contrib.dataset.basic_dataset import FedDataset
from fedlab.core.standalone import StandalonePipeline
from fedlab.utils.aggregator import Aggregators
from fedlab.utils.serialization import SerializationTool

from benchmarks.networks import accuracy, network_of
from benchmarks.workload import Outcome, Workload, seconds_between


class Batches:
    """One client's batches, shuffled anew each time."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, size: int) -> None:
        self.examples = len(targets)
        self._inputs, self._targets, self._size = inputs, targets, size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows in torch.split(torch.randperm(self.examples), self._size):
            yield self._inputs[rows], self._targets[rows]


class Clients(FedDataset):
    """All clients' data in memory."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.num = workload.clients
        self._shards = [workload.client(place) for place in range(workload.clients)]

    def get_dataloader(self, id: int, batch_size: int, type: str = "train") -> Batches:
        inputs, targets = map(torch.from_numpy, self._shards[id])
        return Batches(inputs, targets, batch_size)


class Trainer(FedAvgSerialClientTrainer):
    """Says how many examples a client has trained on."""

    def train(self, model_parameters: torch.Tensor, train_loader: Batches) -> list[torch.Tensor]:
        return [*super().train(model_parameters, train_loader), torch.tensor(train_loader.examples)]


class Handler(FedAvgServerHandler):
    """Weighs clients by their examples."""

    def global_update(self, buffer: list[list[torch.Tensor]]) -> None:
        weights = torch.stack([count for _, count in buffer]).float()
        merged = Aggregators.fedavg_aggregate([parameters for parameters, _ in buffer], weights)
        SerializationTool.deserialize_model(self._model, merged)


class Timed(StandalonePipeline):
    """Notes when each round has ended, where the pipeline would evaluate."""

    def __init__(self, handler: FedAvgServerHandler, trainer: FedAvgSerialClientTrainer) -> None:
        super().__init__(handler, trainer)
        self.times = [time.perf_counter()]

    def evaluate(self) -> None:
        self.times.append(time.perf_counter())


def simulate(path: Path) -> Outcome:
    """(seconds of every round, accuracy)."""
    logging.disable(logging.WARNING)
    workload = Workload.load(path)
    network = network_of(workload)
    handler = Handler(network, workload.rounds, sample_ratio=workload.cohort / workload.clients)
    trainer = Trainer(network, workload.clients)
    trainer.setup_dataset(Clients(workload))
    trainer.setup_optim(epochs=1, batch_size=workload.batch, lr=workload.lr)
    pipeline = Timed(handler, trainer)
    pipeline.main()
    return seconds_between(pipeline.times), accuracy(handler.model, workload)
