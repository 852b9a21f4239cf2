"""The simulated clients: one source, its test part held out, the rest dealt to clients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets

from protocol.job import Job
from sim.partition import partition
from tasks import task_named
from tasks.learner import Learner, ranked
from tasks.reading import Table, example_keys
from tasks.seam import Shard
from tasks.sources import SOURCES, load_source


@dataclass(frozen=True)
class Population:
    """All clients of a simulation; a client's rows are picked when they are asked for."""

    job: Job
    train: datasets.Dataset
    test: datasets.Dataset
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Population:
        """Read the job's source, and hold the test part out.

        Raises:
            DataError, ConfigError: the source is missing or unfit.
        """
        table = read_source(job)
        train, test = hold_out(table, job)
        return cls(job, train, test, table.notes)

    @cached_property
    def rows(self) -> list[list[int]]:
        """Rows of `train` that each client holds."""
        order = ranked(example_keys(self.train), self.job.seed, "partition")
        return partition(self.train, order, self.job)

    def names(self, job: Job) -> list[str]:
        return client_names(job.federation.clients)

    def dataset(self, job: Job, client: str) -> datasets.Dataset:
        return self.train.select(self.rows[int(client.removeprefix("client-"))])

    def test_shard(self, learner: Learner) -> Shard | None:
        """The server's own test set; None where the job holds nothing out."""
        return learner.task.shard(self.test, learner.facts) if len(self.test) else None


def client_names(count: int) -> list[str]:
    """`client-0000`, `client-0001`, …; wide enough that sorting is counting."""
    width = max(4, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]


def read_source(job: Job) -> Table:
    """The job's source: a built-in name, or a path in the task's own format."""
    if job.data.source in SOURCES or not Path(job.data.source).is_absolute():
        return load_source(job.data.source, offline=job.backbone.offline)
    return task_named(job.task.name).read(Path(job.data.source), job.data)


def hold_out(table: Table, job: Job) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(what is dealt to clients, the server's test set): never one example in both.

    The test set is the job's own `data.test`, or the source's test split, or a fraction of the
    source chosen by content, so that equal examples fall on the same side.
    """
    if job.data.test is not None:
        return table.train, task_named(job.task.name).read(Path(job.data.test), job.data).train
    if table.test is not None:
        return table.train, table.test
    keys = example_keys(table.train)
    order = ranked(keys, job.seed, "test")
    count = round(len(keys) * job.data.test_fraction)
    while 0 < count < len(keys) and keys[order[count - 1]] == keys[order[count]]:
        count += 1
    return table.train.select(sorted(order[count:])), table.train.select(sorted(order[:count]))
