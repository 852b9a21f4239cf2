"""A cache of the clients' shards: read once, split, and with features where heads train on them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from atoll.client.dp.example_draws import Numbers, example_numbers
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.state.store import ClientStateStore
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts
from atoll.data.shard import Shard
from atoll.errors import DataChanged
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.learning.split import split_shard
from atoll.protocol.requests import Request
from atoll.tasks.data_info import fitting_rows

logger = logging.getLogger(__name__)

CACHED_SHARDS = 4096
"""How many clients' shards and features a process keeps in memory; the least recently used are dropped."""


class Shards(Protocol):
    """The source of a site's data: its own folders, or a simulated population."""

    def names(self, job: Job) -> Sequence[str]:
        """The names of the site's clients."""
        ...

    def dataset(self, job: Job, client: str) -> Dataset:
        """One client's checked rows.

        Raises:
            DataError: the rows do not fit the job's task.
        """
        ...

    def fingerprint(self, job: Job, client: str) -> str:
        """A hash of the rows' content; constant where rows can't change, as in a simulation.

        Raises:
            DataError: the rows do not fit the job's task.
        """
        ...

    def counts(self, job: Job, client: str) -> Sequence[Counts]:
        """How much of the client's data is used and why the rest is left out; empty in a simulation."""
        ...


@dataclass(frozen=True)
class LoadedShard:
    """One client's shard, split, with its features [views, n, width] where training needs nothing else."""

    train: Shard
    validation: Shard
    features: torch.Tensor | None

    @cached_property
    def numbers(self) -> Numbers:
        """A number for each training example, [n], from which its random draws follow."""
        return example_numbers(self.train.keys)


@dataclass
class ShardCache:
    """The most recently used clients' loaded shards, by client, job and content.

    How many examples were left out because they don't fit the job is written to the site's log only.
    """

    shards: Shards
    memory: ClientStateStore
    has_budget: bool = False
    _loaded: dict[tuple[str, str, str], LoadedShard] = field(default_factory=dict)
    _fingerprints: dict[tuple[str, str], str] = field(default_factory=dict)

    def load(self, learner: Learner, name: str, request: Request) -> LoadedShard:
        """The client's shard, split as the learner's job says.

        Raises:
            DataError: it can't be read, or does not fit the job's task.
            DataChanged: its content has changed since the greeting, the first use, or the run's begin.
        """
        key = (name, learner.job.hash, self._unchanged(learner.job, name, request.run))
        if key in self._loaded:
            self._loaded[key] = self._loaded.pop(key)
            return self._loaded[key]
        shard = learner.task.shard(self._fitting(learner, name), request.data_info)
        part, validation = split_shard(learner.job, learner.task, shard)
        features = learner.features.for_training(part) if learner.trains_on_features else None
        while len(self._loaded) >= CACHED_SHARDS:
            self._loaded.pop(next(iter(self._loaded)))
        self._loaded[key] = LoadedShard(learner.objective.with_soft_labels(part), validation, features)
        return self._loaded[key]

    def _fitting(self, learner: Learner, name: str) -> Dataset:
        dataset = self.shards.dataset(learner.job, name)
        fitting = fitting_rows(learner.job, learner.task, dataset, has_budget=self.has_budget)
        if len(fitting) < len(dataset):
            left_out = len(dataset) - len(fitting)
            logger.warning("%s: %d examples don't fit the job and are left out", name, left_out)
        return fitting

    def note_content(self, job: Job, name: str) -> None:
        """Remember the shard's fingerprint when a run begins; later loads compare with it."""
        self._fingerprints[name, job.hash] = self.shards.fingerprint(job, name)

    def clear(self) -> None:
        """Drop all loaded shards, but not their fingerprints."""
        self._loaded.clear()

    def _unchanged(self, job: Job, name: str, run: str) -> str:
        """The fingerprint; it must be that of this process's first use, and of the run's before restarts."""
        fingerprint = self.shards.fingerprint(job, name)
        first = self._fingerprints.setdefault((name, job.hash), fingerprint)
        if not fingerprint == first == self.memory.data_of(run, name, fingerprint):
            raise DataChanged()
        return fingerprint


@dataclass(frozen=True)
class LoadedClients:
    """The clients of one request, each with its own loaded shard."""

    shards: Mapping[str, LoadedShard]
    device: str

    @property
    def names(self) -> Sequence[str]:
        return list(self.shards)

    def train(self, client: str) -> Shard:
        return self.shards[client].train

    def validation(self, client: str) -> Shard:
        return self.shards[client].validation

    def feature_table(self) -> tuple[FeatureTable, list[ClientRows]]:
        return feature_table(self.shards, self.device)


def feature_table(shards: Mapping[str, LoadedShard], device: str) -> tuple[FeatureTable, list[ClientRows]]:
    """(the loaded shards' features in one table, each client's rows in it)."""
    parts = [one.features for one in shards.values() if one.features is not None]
    ends = np.cumsum([len(one.train) for one in shards.values()]).tolist()
    client_rows = [
        ClientRows(name, np.arange(end - len(one.train), end), one.numbers)
        for (name, one), end in zip(shards.items(), ends, strict=True)
    ]
    targets = torch.cat([one.train.table for one in shards.values()])
    return FeatureTable.of(torch.cat(parts, dim=1), targets, device), client_rows
