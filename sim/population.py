"""The simulated clients: one source, its test part held out, the rest dealt to clients."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property

import datasets

from protocol.job import Job
from server.testset import hold_out, read_source
from sim.partition import partition
from tasks.learner import Learner, ranked
from tasks.reading import example_keys
from tasks.seam import Shard, canonical_order


@dataclass(frozen=True)
class Population:
    """All clients of a simulation: `rows` of `train` for each; its shard is made when it is asked for."""

    job: Job
    train: datasets.Dataset
    test: datasets.Dataset
    keys: list[bytes]
    rows: list[list[int]]
    notes: tuple[str, ...] = ()
    _whole: dict[str, Shard] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> Population:
        """Read the job's source, and hold the test part out.

        Raises:
            DataError, ConfigError: the source is missing or unfit.
        """
        table = read_source(job)
        train, test = hold_out(table, job)
        keys = example_keys(train)
        rows = partition(train, ranked(keys, job.seed, "partition"), job)
        return cls(job, train, test, keys, rows, table.notes)

    def names(self, job: Job) -> list[str]:
        return client_names(job.federation.clients)

    def dataset(self, job: Job, client: str) -> datasets.Dataset:
        return self.train.select(self.rows[int(client.removeprefix("client-"))])

    def fingerprint(self, job: Job, client: str) -> str:
        """Nothing: simulated clients' rows are fixed for the run."""
        return ""

    def whole(self, learner: Learner) -> Shard:
        """All training examples as one shard; its i-th is row `order[i]` of `train`."""
        key = json.dumps(learner.facts, sort_keys=True)
        if key not in self._whole:
            self._whole.clear()
            self._whole[key] = learner.task.shard(self.train, learner.facts, self.keys)
        return self._whole[key]

    @cached_property
    def order(self) -> list[int]:
        """Rows of `train` in canonical order."""
        return canonical_order(self.keys)

    def test_shard(self, learner: Learner) -> Shard | None:
        """The server's own test set; None where the job holds nothing out."""
        return learner.task.shard(self.test, learner.facts) if len(self.test) else None


def client_names(count: int) -> list[str]:
    """`client-0000`, `client-0001`, …; wide enough that sorting is counting."""
    width = max(4, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]
