"""pfl-research: FederatedAveraging on SimulatedBackend.

As its guide to fast simulations says: data in memory as `Dataset`s made once, no evaluation
between rounds, and several processes through torchrun (`--standalone --nproc_per_node=2`), which
share a cohort evenly. pfl cuts a client's batches once and doesn't shuffle them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops.selector import get_framework_module
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

from benchmarks.networks import accuracy, network_of
from benchmarks.workload import Outcome, Workload, seconds_between


class Stamps(TrainingProcessCallback):
    """Notes when training begins and when each round has ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.times.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.times.append(time.perf_counter())
        return False, Metrics()


def federation_of(workload: Workload) -> FederatedDataset:
    """Every client's data in memory; uneven clients are dealt to processes by their size."""
    users = {}
    for place in range(workload.clients):
        inputs, targets = workload.client(place)
        users[place] = Dataset((torch.from_numpy(inputs), torch.from_numpy(targets)), user_id=str(place))
    uneven = len(set(workload.sizes.tolist())) > 1
    weights = {place: int(size) for place, size in enumerate(workload.sizes)} if uneven else None
    sampler = get_user_sampler("random", list(users))
    return FederatedDataset(users.__getitem__, sampler, user_id_to_weight=weights)


def add_loss(network: torch.nn.Module) -> torch.nn.Module:
    """pfl asks a network for its loss and for metrics."""

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(inputs), targets)

    network.loss = loss  # type: ignore[assignment]
    network.metrics = lambda *_: {}  # type: ignore[assignment]
    return network


def simulate(path: Path) -> Outcome:
    """(seconds of every round, accuracy); every process of several gets the same."""
    workload = Workload.load(path)
    np.random.seed(1)  # pfl's way of telling all processes the same cohorts
    torch.manual_seed(1)
    network = add_loss(network_of(workload))
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    federation = federation_of(workload)
    backend = SimulatedBackend(federation, federation, postprocessors=[WeightByDatapoints()])
    stamps = Stamps()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=workload.rounds,
            evaluation_frequency=workload.rounds + 1,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workload.lr, local_batch_size=workload.batch
        ),
        callbacks=[stamps],
        send_metrics_to_platform=False,
    )
    if get_framework_module().distributed.world_size > 1:
        torch.distributed.barrier()
    return seconds_between(stamps.times), accuracy(network, workload)
