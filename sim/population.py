"""The simulated clients: one source, its test part held out, the rest dealt to clients."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from protocol.job import Job
from server.testset import hold_out, read_source
from sim.partition import partition
from tasks.learner import Learner, ranked
from tasks.reading import example_keys
from tasks.seam import Shard


@dataclass(frozen=True)
class Population:
    """All clients of a simulation: `rows` of `train` for each; its shard is made when it is asked for."""

    job: Job
    train: datasets.Dataset
    test: datasets.Dataset
    rows: list[list[int]]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Job) -> Population:
        """Read the job's source, and hold the test part out.

        Raises:
            DataError, ConfigError: the source is missing or unfit.
        """
        table = read_source(job)
        train, test = hold_out(table, job)
        return cls(job, train, test, deal(train, job), table.notes)

    def names(self, job: Job) -> list[str]:
        return client_names(job.federation.clients)

    def dataset(self, job: Job, client: str) -> datasets.Dataset:
        return self.train.select(self.rows[int(client.removeprefix("client-"))])

    def fingerprint(self, job: Job, client: str) -> str:
        """Nothing: simulated clients' rows are fixed for the run."""
        return ""

    def test_shard(self, learner: Learner) -> Shard | None:
        """The server's own test set; None where the job holds nothing out."""
        return learner.task.shard(self.test, learner.facts) if len(self.test) else None


def deal(train: datasets.Dataset, job: Job) -> list[list[int]]:
    """Rows of `train` that each client holds."""
    return partition(train, ranked(example_keys(train), job.seed, "partition"), job)


def client_names(count: int) -> list[str]:
    """`client-0000`, `client-0001`, …; wide enough that sorting is counting."""
    width = max(4, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]
