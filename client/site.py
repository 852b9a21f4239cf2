"""A site at work: the shards it holds, the learner it keeps warm, its answers to the server."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from client.heads import Examples, HeadWork, train_heads
from client.train import train_model
from protocol.errors import InputError
from protocol.job import Job
from protocol.messages import Facts, Failure, Hello, Measurement, Reply, Request, Update
from tasks import task_named
from tasks.learner import Learner
from tasks.seam import Shard

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

KEPT_SHARDS = 4096
"""Clients whose shard and features a process keeps in memory; the least recent are let go."""


class Shards(Protocol):
    """Where a site's data comes from: folders of its own, or a simulated population."""

    def names(self, job: Job) -> list[str]:
        """The clients that live here."""
        ...

    def dataset(self, job: Job, client: str) -> datasets.Dataset:
        """One client's checked rows.

        Raises:
            DataError: they are not fit for the job's task.
        """
        ...


@dataclass(frozen=True)
class Held:
    """One client's shard, split; features of the training part where the backbone is frozen."""

    train: Shard
    validation: Shard
    features: torch.Tensor | None


@dataclass
class Site:
    """Answers for the clients that live in this process; everything costly stays warm."""

    shards: Shards
    _learners: dict[str, Learner] = field(default_factory=dict)
    _held: dict[tuple[str, str], Held] = field(default_factory=dict)

    def hello(self, job: Job) -> list[Hello]:
        """Who lives here, what their data looks like, or why they do not take part."""
        return [self._hello(job, name) for name in self.shards.names(job)]

    def _hello(self, job: Job, name: str) -> Hello:
        try:
            dataset = self.shards.dataset(job, name)
            facts = task_named(job.task.name).describe(dataset, job.data)
        except InputError as error:
            return Hello(name, {}, 0, refusal=str(error))
        return Hello(name, facts, len(dataset))

    def answer(self, request: Request, names: Sequence[str]) -> Iterator[Reply]:
        """One reply for each named client; what went wrong at one does not touch the others."""
        try:
            job = Job.from_json(request.job)
            learner = self.learner(job, request.facts)
        except InputError as error:
            yield from (Failure(name, str(error)) for name in names)
            return
        torch.set_num_threads(job.train.threads)
        logger.info("round %d of %s: %s %s", request.round, job.name, request.kind, ", ".join(names))
        held = {}
        for name in names:
            try:
                held[name] = self._hold(learner, name, request.facts)
            except InputError as error:
                yield Failure(name, str(error))
        work = train if request.kind == "train" else evaluate
        yield from work(learner, request, held)

    def learner(self, job: Job, facts: Facts) -> Learner:
        """The warm learner of a job; its weights must be the very ones the server has.

        Raises:
            ConfigError, WeightsError: it can't be had here.
        """
        key = job.hash + json.dumps(facts, sort_keys=True)
        if key not in self._learners:
            self._learners.clear()
            self._held.clear()
            learner = Learner.of(job, task_named(job.task.name), facts)
            learner.check_fingerprint()
            self._learners[key] = learner
        return self._learners[key]

    def _hold(self, learner: Learner, name: str, facts: Facts) -> Held:
        key = (name, learner.job.hash)
        if key in self._held:
            self._held[key] = self._held.pop(key)
            return self._held[key]
        shard = learner.task.shard(self.shards.dataset(learner.job, name), facts)
        part, validation = learner.split(shard)
        features = learner.features(part) if learner.uses_features else None
        while len(self._held) >= KEPT_SHARDS:
            self._held.pop(next(iter(self._held)))
        self._held[key] = Held(part, validation, features)
        return self._held[key]


def train(learner: Learner, request: Request, held: dict[str, Held]) -> Iterator[Update]:
    """Local training of the named clients: heads all at once, anything else one by one."""
    if learner.uses_features:
        if held:
            examples, works = heads_of(held)
            yield from train_heads(request.tensors, examples, works, learner.job, request.round, request.plan)
        return
    for name, h in held.items():
        yield train_model(
            learner,
            request.tensors,
            h.train,
            learner.job,
            client=name,
            round=request.round,
            plan=request.plan,
        )


def heads_of(held: dict[str, Held]) -> tuple[Examples, list[HeadWork]]:
    """The held shards' features in one table, and which of its rows are whose."""
    parts = [h.features for h in held.values() if h.features is not None]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    works = [
        HeadWork(name, np.arange(end - len(part), end))
        for name, part, end in zip(held, parts, ends, strict=True)
    ]
    return Examples.of(torch.cat(parts), torch.cat([h.train.targets for h in held.values()])), works


def evaluate(learner: Learner, request: Request, held: dict[str, Held]) -> Iterator[Measurement]:
    """The global model on each named client's validation split; one without a split measures nothing."""
    for name, h in held.items():
        states = learner.evaluate(request.tensors, h.validation) if len(h.validation) else {}
        yield Measurement(name, request.round, len(h.validation), states)
