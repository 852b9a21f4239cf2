"""A simulated population at hand as one table: a client is a few rows of it, found without reading.

The whole training data is one shard in canonical order, so a client's rows, sorted, are the
client's own shard in canonical order, and its validation split follows from hashes that are
computed once. What a real client does with its own data gives the same rows. Of a client
nothing is kept but its rows, and those of the clients seen last.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain

import numpy as np
import torch

from atoll.client.dp.example_draws import Numbers, example_numbers
from atoll.client.dp.gradient_sums import head_sums
from atoll.client.dp.secure_aggregation import contributions, sums
from atoll.client.heads.class_imbalance import loss_by_example
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.site import ChargedClients, LoadedShard, Site, local_training
from atoll.client.state.error_feedback import compressed
from atoll.client.state.personalization import model_to_evaluate, train_ditto
from atoll.client.training.vmap import vmap_training
from atoll.data.shard import Shard
from atoll.job.closed_form import STATISTICS
from atoll.job.job import Job
from atoll.learning.few_shot import training_rows
from atoll.learning.learner import Learner
from atoll.privacy.dp_plan import distributed_terms
from atoll.protocol.messages import DataInfo, Measurement, Reply, Request, Update
from atoll.protocol.stacked_updates import StackedUpdates, joined
from atoll.protocol.tensors import Tensors
from atoll.protocol.validation_split import Marks, helps_clients, kept_back, validation_marks
from atoll.sim.population.assignment import Rows
from atoll.sim.population.population import Population, number_of

TABLE_BYTES = 1 << 30
"""Features of more than this are not held as one table; a cohort's are then looked up every round."""
FEWEST = 16
"""Clients that are worth a thread of their own."""
KEPT_ROWS = 1 << 14
"""Clients whose rows are remembered."""


@dataclass(frozen=True)
class PopulationIndex:
    """The population as one shard, and the numbers that say which examples are measured on."""

    population: Population
    learner: Learner
    _splits: OrderedDict[int, tuple[Rows, Rows]] = field(default_factory=OrderedDict)

    @cached_property
    def full_population(self) -> Shard:
        """All training examples in canonical order."""
        return self.population.whole(self.learner)

    @cached_property
    def examples(self) -> FeatureTable | None:
        """Features of all training examples, if they are few enough for one table."""
        whole, learner = self.full_population, self.learner
        held = len(whole) * (learner.job.train.cached_views or 1)
        if held * learner.width * 4 > TABLE_BYTES:
            return None
        return FeatureTable.of(
            learner.training_features(whole), self.training_view.table, learner.job.train.device
        )

    @cached_property
    def training_view(self) -> Shard:
        """All training examples as training sees them."""
        return self.learner.with_soft_labels(self.full_population)

    @cached_property
    def _validation_marks(self) -> Marks:
        return validation_marks(self.full_population.keys, self.learner.job.seed)

    def splits(self, clients: Sequence[int]) -> list[tuple[Rows, Rows]]:
        """(training rows, validation rows) of each client, as `Learner.split` chooses them."""
        new = [client for client in clients if client not in self._splits]
        for client, rows in zip(new, self.population.assignment.rows(new), strict=True):
            self._splits[client] = self._split(self.population.place[rows])
        found = [self._splits[client] for client in clients]
        for client in clients:
            self._splits.move_to_end(client)
        while len(self._splits) > KEPT_ROWS:
            self._splits.popitem(last=False)
        return found

    def _split(self, rows: Rows) -> tuple[Rows, Rows]:
        rows = np.sort(rows)
        task, job = self.learner.task, self.learner.job
        helped = helps_clients(job)
        if task.has_own_split:
            held = self.full_population.select(rows.tolist())
            own = task.split(held, job.seed, job.data.validation_fraction, helped=helped)
            return rows[own[0]], rows[own[1]]
        marks = self._validation_marks[rows]
        kept = kept_back(marks, job.data, helped=helped)
        if job.data.shots is None:
            return rows[~kept], rows[kept]
        held = self.full_population.select(rows.tolist())
        return rows[training_rows(marks, kept, held, job.data.shots)], rows[kept]

    def client_rows(self, names: Sequence[str]) -> tuple[FeatureTable, list[ClientRows]]:
        """Examples, and which of their rows those clients train on."""
        parts = [train for train, _ in self.splits([number_of(name) for name in names])]
        numbers = [self._numbers(rows) for rows in parts]
        if self.examples is not None:
            return self.examples, [ClientRows(*work) for work in zip(names, parts, numbers, strict=True)]
        used, places = np.unique(np.concatenate(parts), return_inverse=True)
        cohort = self.training_view.select(used.tolist())
        device = self.learner.job.train.device
        examples = FeatureTable.of(self.learner.training_features(cohort), cohort.table, device)
        ends = np.cumsum([len(part) for part in parts])[:-1]
        shares = np.split(places, ends)
        return examples, [ClientRows(*work) for work in zip(names, shares, numbers, strict=True)]

    def _numbers(self, rows: Rows) -> Numbers | None:
        """What the draws of a client's examples are made of, where examples are promised privacy."""
        if "example" not in self.learner.job.privacy.units:
            return None
        keys = self.full_population.keys
        return example_numbers([keys[row] for row in rows.tolist()])


@dataclass
class SimulatedSite(Site):
    """All simulated clients in this process; a cohort of heads trains on rows of one table.

    With several `workers` it trains as so many blocks, each in a thread of its own; the bits stay
    the same. `at_once` trains what isn't a head by torch.func, whose bits are others.
    """

    population: Population = field(kw_only=True)
    workers: int = 1
    at_once: bool = False
    _index: dict[int, PopulationIndex] = field(default_factory=dict)

    def answer(self, request: Request, names: Sequence[str]) -> Iterable[Reply]:
        """As a site; heads train on the table, without a shard being built."""
        learner = self.learner(Job.from_json(request.job), request.data_info)
        torch.set_num_threads(learner.job.train.threads)
        if request.kind == "evaluate":
            return self._measure(learner, request, names)
        if not names:
            return []
        is_plain = not learner.trains_on_features and not learner.job.privacy.units
        if self.at_once and request.kind == "train" and is_plain:
            shards = {name: self._load_shard(learner, name, request.data_info).train for name in names}
            job = learner.job
            updates = vmap_training(
                learner, request.tensors, shards, job, round=request.round, plan=request.plan
            )
            return compressed(updates, request, job, self.memory)
        if not learner.trains_on_features or request.kind == STATISTICS:
            return super().answer(request, names)
        charged_clients, failures = self.charge_privacy(learner.job, request, names)
        if not charged_clients.names:
            return failures
        examples, client_rows = self.index(learner).client_rows(charged_clients.names)
        replies = self._of_heads(learner, request, examples, client_rows, charged_clients)
        return chain(failures, replies) if failures else replies

    def _of_heads(
        self,
        learner: Learner,
        request: Request,
        examples: FeatureTable,
        client_rows: list[ClientRows],
        charged_clients: ChargedClients,
    ) -> Iterable[Reply]:
        dp_plan, job, private = distributed_terms(learner.job), learner.job, charged_clients.private
        if request.kind == "sum" and dp_plan is not None and dp_plan.unit == "example":
            assert private is not None
            loss = loss_by_example(job, learner.task.head_loss)
            summed = sums(head_sums(request.tensors, examples, client_rows, loss, private))
            return self.secure_session.encode_contributions(job, request, summed, charged_clients.charged)
        local = local_training(learner, request, private)
        if job.personal.keep == "mixture":

            def from_own(asked: Request, starts: Mapping[str, Tensors]) -> Iterable[Update]:
                own = replace(local_training(learner, asked, None), starts=starts)
                return self._train(examples, client_rows, asked.tensors, own)

            mixed = train_ditto(learner, request, [w.client for w in client_rows], from_own, self.memory)
            return compressed(mixed, request, job, self.memory)
        updates = self._train(examples, client_rows, request.tensors, local)
        if request.kind == "sum":
            return self.secure_session.encode_contributions(
                job, request, contributions(updates, dp_plan), charged_clients.charged
            )
        return compressed(updates, request, job, self.memory)

    def _train(
        self, examples: FeatureTable, client_rows: list[ClientRows], head: Tensors, local: HeadTrainingConfig
    ) -> StackedUpdates:
        def block(part: list[ClientRows]) -> StackedUpdates:
            torch.set_num_threads(local.job.train.threads)
            return train_heads(head, examples, part, local)

        parts = list(self._blocks(client_rows))
        if len(parts) == 1:
            return block(client_rows)
        return joined(list(self._pool.map(block, parts)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # Its threads stay: a new one first sets up torch's own, which takes as long as a block.
        return ThreadPoolExecutor(self.workers)

    def _blocks(self, client_rows: list[ClientRows]) -> Iterator[list[ClientRows]]:
        count = max(1, min(self.workers, os.cpu_count() or 1, len(client_rows) // FEWEST))
        size = -(-len(client_rows) // count)
        return (client_rows[start : start + size] for start in range(0, len(client_rows), size))

    def _measure(self, learner: Learner, request: Request, names: Sequence[str]) -> Iterator[Measurement]:
        index = self.index(learner)
        for name, (lessons, rows) in zip(names, index.splits([number_of(n) for n in names]), strict=True):
            part = index.full_population.select(rows.tolist())
            lesson = partial(index.training_view.select, lessons.tolist())
            model = model_to_evaluate(learner, request, name, self.memory, lesson)
            states = learner.evaluate(model, part) if len(part) else {}
            yield Measurement(name, request.round, len(part), states)

    def index(self, learner: Learner) -> PopulationIndex:
        """The population as this learner sees it."""
        if id(learner) not in self._index:
            self._index = {id(learner): PopulationIndex(self.population, learner)}
        return self._index[id(learner)]

    def _load_shard(self, learner: Learner, name: str, data_info: DataInfo) -> LoadedShard:
        index = self.index(learner)
        [(train, validation)] = index.splits([number_of(name)])
        part = index.training_view.select(train.tolist())
        return LoadedShard(part, index.full_population.select(validation.tolist()), None)
