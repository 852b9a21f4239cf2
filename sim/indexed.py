"""A simulated population at hand as one table: a client is a few rows of it, found without reading.

The whole training data is one shard in canonical order, so a client's rows, sorted, are the
client's own shard in canonical order, and its validation split follows from ranks that are
computed once. What a real client does with its own data gives the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from client.heads import Examples, HeadWork, train_heads
from client.site import Held, Site
from protocol.cohort import StackedUpdates, joined
from protocol.job import Job
from protocol.messages import Facts, Hello, Reply, Request
from sim.population import Population, client_names
from tasks import task_named
from tasks.learner import Learner, ranked
from tasks.seam import Shard

TABLE_BYTES = 2 << 30
"""Features of more than this are not held as one table; clients then look theirs up one by one."""
FEWEST = 16
"""Clients that are worth a thread of their own."""


@dataclass(frozen=True)
class Index:
    """The population as one shard, each client's rows of it, and the order validation is drawn in."""

    whole: Shard
    rows: list[NDArray[np.int64]]
    validation_rank: NDArray[np.int64]
    examples: Examples | None
    _train_rows: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def of(cls, population: Population, learner: Learner) -> Index:
        """Index a population for a learner; features are taken from its cache."""
        whole = population.whole(learner)
        place = np.empty(len(whole), dtype=np.int64)
        place[np.array(population.order)] = np.arange(len(whole))
        rank = np.empty(len(whole), dtype=np.int64)
        rank[ranked(whole.keys, learner.job.seed, "validation")] = np.arange(len(whole))
        job = learner.job
        held = len(whole) * (job.train.cached_views or 1)
        fits = job.trains_on_features and held * learner.width * 4 <= TABLE_BYTES
        features = learner.training_features(whole) if fits else None
        examples = None if features is None else Examples.of(features, whole.targets, job.train.device)
        return cls(whole, [np.sort(place[rows]) for rows in population.rows], rank, examples)

    def train_rows(self, client: int, fraction: float) -> NDArray[np.int64]:
        """The training rows alone, remembered."""
        if client not in self._train_rows:
            self._train_rows[client] = self.split(client, fraction)[0]
        return self._train_rows[client]

    def split(self, client: int, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(training rows, validation rows) of a client, as `Learner.split` chooses them."""
        rows = self.rows[client]
        count = min(round(len(rows) * fraction), len(rows) - 1)
        drawn = rows[np.argsort(self.validation_rank[rows], kind="stable")]
        return np.sort(drawn[count:]), np.sort(drawn[:count])


@dataclass
class IndexedSite(Site):
    """All simulated clients in this process; a cohort of heads trains on rows of one table.

    With several `workers` it trains as so many blocks, each in a thread of its own; the bits stay
    the same.
    """

    population: Population = field(kw_only=True)
    workers: int = 1
    _index: dict[int, Index] = field(default_factory=dict)

    def hello(self, job: Job) -> list[Hello]:
        """As a site, but the labels are looked at once for all."""
        population, task = self.population, task_named(job.task.name)
        labels, codes = np.unique(np.array(population.train["label"]), return_inverse=True)
        common = task.describe(population.train, job.data)
        hellos = []
        for name, rows in zip(client_names(job.federation.clients), population.rows, strict=True):
            present = labels[np.unique(codes[rows])].tolist()
            facts: Facts = common if common.get("pinned") else {"classes": present}
            hellos.append(Hello(name, facts, len(rows)))
        return hellos

    def answer(self, request: Request, names: Sequence[str]) -> Iterable[Reply]:
        """As a site; heads train on the table, without a shard being built."""
        learner = self.learner(Job.from_json(request.job), request.facts)
        index = self._indexed(learner)
        if request.kind != "train" or index.examples is None or not names:
            return super().answer(request, names)
        torch.set_num_threads(learner.job.train.threads)
        fraction = learner.job.data.validation_fraction
        works = [HeadWork(name, index.train_rows(number_of(name), fraction)) for name in names]
        return self._train(index.examples, works, learner.job, request)

    def _train(self, examples: Examples, works: list[HeadWork], job: Job, request: Request) -> StackedUpdates:
        def block(part: list[HeadWork]) -> StackedUpdates:
            torch.set_num_threads(job.train.threads)
            return train_heads(request.tensors, examples, part, job, request.round, request.plan)

        parts = list(self._blocks(works))
        if len(parts) == 1:
            return block(works)
        with ThreadPoolExecutor(len(parts)) as pool:
            return joined(list(pool.map(block, parts)))

    def _blocks(self, works: list[HeadWork]) -> Iterator[list[HeadWork]]:
        count = max(1, min(self.workers, os.cpu_count() or 1, len(works) // FEWEST))
        size = -(-len(works) // count)
        return (works[start : start + size] for start in range(0, len(works), size))

    def _indexed(self, learner: Learner) -> Index:
        if id(learner) not in self._index:
            self._index = {id(learner): Index.of(self.population, learner)}
        return self._index[id(learner)]

    def _hold(self, learner: Learner, name: str, facts: Facts) -> Held:
        index = self._indexed(learner)
        train, validation = index.split(number_of(name), learner.job.data.validation_fraction)
        part = index.whole.select(train.tolist())
        features = learner.training_features(part) if learner.job.trains_on_features else None
        return Held(part, index.whole.select(validation.tolist()), features)


def number_of(client: str) -> int:
    """3 of `client-0003`."""
    return int(client.removeprefix("client-"))
