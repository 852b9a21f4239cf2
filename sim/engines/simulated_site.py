"""A simulated population as one table, in which each client is a few rows.

The whole training data is one shard in canonical order. A client's rows, sorted, are therefore its own shard
in canonical order, and its validation split follows from hashes that are computed once. A real client with
the same data would get the same rows. Only the rows of recently used clients are in memory.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from atoll.client.dispatch import ClientData, LocalWork, ModelTrainer
from atoll.client.dp.example_draws import Numbers, example_numbers
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.site import Site
from atoll.client.training.local_steps import with_assigned_steps
from atoll.client.training.vmap import vmap_training
from atoll.data.shard import Shard
from atoll.learning.learner import Learner
from atoll.learning.split import training_rows
from atoll.protocol.messages import Reply
from atoll.protocol.requests import Request, TrainingRequest
from atoll.protocol.stacked_updates import StackedUpdates, joined
from atoll.protocol.tensors import Tensors
from atoll.protocol.validation_split import Marks, helps_clients, kept_back, validation_marks
from atoll.sim.population.assignment import Rows
from atoll.sim.population.population import Population, number_of

TABLE_BYTES = 1 << 30
"""The largest table of all features in memory; above it, a cohort's features are looked up every round."""
MIN_CLIENTS_PER_THREAD = 16
"""The least number of clients for which a further thread is used."""
MAX_CACHED_CLIENTS = 1 << 14
"""How many clients' rows are cached."""


@dataclass(frozen=True)
class PopulationIndex:
    """The population as one shard, and the hashes that decide each example's side of the validation split."""

    population: Population
    learner: Learner
    _splits: OrderedDict[int, tuple[Rows, Rows]] = field(default_factory=OrderedDict)

    @cached_property
    def full_population(self) -> Shard:
        """All training examples in canonical order."""
        return self.population.whole(self.learner)

    @cached_property
    def examples(self) -> FeatureTable | None:
        """Features of all training examples as one table; None where it would exceed `TABLE_BYTES`."""
        whole, learner = self.full_population, self.learner
        held = len(whole) * (learner.job.train.cached_views or 1)
        if held * learner.features.width * 4 > TABLE_BYTES:
            return None
        return FeatureTable.of(
            learner.features.for_training(whole), self.training_view.table, learner.job.train.device
        )

    @cached_property
    def training_view(self) -> Shard:
        """All training examples with the targets that training uses."""
        return self.learner.objective.with_soft_labels(self.full_population)

    @cached_property
    def _validation_marks(self) -> Marks:
        return validation_marks(self.full_population.keys, self.learner.job.seed)

    def splits(self, clients: Sequence[int]) -> list[tuple[Rows, Rows]]:
        """(training rows, validation rows) of each client, as `Learner.split` chooses them."""
        new = [client for client in clients if client not in self._splits]
        for client, rows in zip(new, self.population.assignment.rows(new), strict=True):
            self._splits[client] = self._split(self.population.place[rows])
        splits = [self._splits[client] for client in clients]
        for client in clients:
            self._splits.move_to_end(client)
        while len(self._splits) > MAX_CACHED_CLIENTS:
            self._splits.popitem(last=False)
        return splits

    def _split(self, rows: Rows) -> tuple[Rows, Rows]:
        rows = np.sort(rows)
        task, job = self.learner.task, self.learner.job
        helped = helps_clients(job)
        if task.has_own_split:
            held = self.full_population.select(rows.tolist())
            split = task.split(held, job.seed, job.data.validation_fraction, helped=helped)
            return rows[split[0]], rows[split[1]]
        marks = self._validation_marks[rows]
        measured = kept_back(marks, job.data, helped=helped)
        if job.data.shots is None:
            return rows[~measured], rows[measured]
        held = self.full_population.select(rows.tolist())
        return rows[training_rows(marks, measured, held, job.data.shots)], rows[measured]

    def client_rows(self, names: Sequence[str]) -> tuple[FeatureTable, list[ClientRows]]:
        """(a feature table, the rows in it on which each of these clients trains)."""
        parts = [train for train, _ in self.splits([number_of(name) for name in names])]
        numbers = [self._numbers(rows) for rows in parts]
        if self.examples is not None:
            return self.examples, [ClientRows(*work) for work in zip(names, parts, numbers, strict=True)]
        used, places = np.unique(np.concatenate(parts), return_inverse=True)
        cohort = self.training_view.select(used.tolist())
        device = self.learner.job.train.device
        examples = FeatureTable.of(self.learner.features.for_training(cohort), cohort.table, device)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        shares = np.split(places, ends)
        return examples, [ClientRows(*work) for work in zip(names, shares, numbers, strict=True)]

    def _numbers(self, rows: Rows) -> Numbers | None:
        """The numbers that seed the draws of a client's examples, under example-level privacy, else None."""
        if "example" not in self.learner.job.privacy.units:
            return None
        keys = self.full_population.keys
        return example_numbers([keys[row] for row in rows.tolist()])


@dataclass
class SimulatedSite(Site):
    """The site of all simulated clients in this process; a cohort's heads are trained on one table.

    With several `workers` the cohort is trained in as many blocks, each in its own thread, with the same
    bits. With `at_once` whole models are trained together by torch.func, with other bits.
    """

    population: Population = field(kw_only=True)
    workers: int = 1
    at_once: bool = False
    _index: dict[int, PopulationIndex] = field(default_factory=dict)

    def load(
        self, learner: Learner, request: Request, names: Sequence[str]
    ) -> tuple[ClientData, list[Reply]]:
        """(the clients' data, no failures): rows of the population's table; shards are built on access."""
        return IndexedClients(self.index(learner), names), []

    @property
    def train_models(self) -> ModelTrainer | None:
        return vmapped if self.at_once else None

    def train_heads(
        self, head: Tensors, examples: FeatureTable, rows: Sequence[ClientRows], local: HeadTrainingConfig
    ) -> StackedUpdates:
        """The clients' updates of the shared head, trained in `workers` parallel blocks."""

        def block(part: Sequence[ClientRows]) -> StackedUpdates:
            torch.set_num_threads(local.job.train.threads)
            return train_heads(head, examples, part, local)

        parts = list(self._blocks(rows))
        if len(parts) == 1:
            return block(rows)
        return joined(list(self._pool.map(block, parts)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # Its threads stay: a new one first sets up torch's own, which takes as long as a block.
        return ThreadPoolExecutor(self.workers)

    def _blocks(self, client_rows: Sequence[ClientRows]) -> Iterator[Sequence[ClientRows]]:
        count = max(1, min(self.workers, os.cpu_count() or 1, len(client_rows) // MIN_CLIENTS_PER_THREAD))
        size = -(-len(client_rows) // count)
        return (client_rows[start : start + size] for start in range(0, len(client_rows), size))

    def index(self, learner: Learner) -> PopulationIndex:
        """The index of the population for this learner."""
        if id(learner) not in self._index:
            self._index = {id(learner): PopulationIndex(self.population, learner)}
        return self._index[id(learner)]


@dataclass(frozen=True)
class IndexedClients:
    """The data of one request's clients, as rows of the population's table."""

    index: PopulationIndex
    names: Sequence[str]

    def train(self, client: str) -> Shard:
        [(train, _)] = self.index.splits([number_of(client)])
        return self.index.training_view.select(train.tolist())

    def validation(self, client: str) -> Shard:
        [(_, validation)] = self.index.splits([number_of(client)])
        return self.index.full_population.select(validation.tolist())

    def feature_table(self) -> tuple[FeatureTable, list[ClientRows]]:
        return self.index.client_rows(self.names)


def vmapped(work: LocalWork, request: TrainingRequest) -> StackedUpdates:
    """The clients' updates of whole models, trained together by torch.func."""
    shards = {name: work.data.train(name) for name in work.data.names}
    job = with_assigned_steps(work.learner.job, request.plan)
    return vmap_training(work.learner, request.tensors, shards, job, round=request.round, plan=request.plan)
