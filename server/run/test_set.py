"""The server's own test set, in a simulation and in a federation alike."""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path

from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts
from atoll.data.shard import Shard
from atoll.datasets.brought import brought_source
from atoll.datasets.hub import hub_source
from atoll.datasets.registry import ALL_SOURCES, load_source
from atoll.job.job import Job
from atoll.learning.learner import Learner, ranked
from atoll.server.job_checks import check_source
from atoll.server.rounds.run_state import TestSet
from atoll.tasks import task_named
from atoll.tasks.task import Task

logger = logging.getLogger(__name__)


def read_source(job: Job) -> Table:
    """The data of the job's source: a built-in one, an extension's, one of the Hub, or a path.

    Raises:
        ConfigError, DataError: the source is missing or does not fit the task.
    """
    if Path(job.data.source).is_absolute():
        return task_named(job.task.name).read(Path(job.data.source), job.data, job.task.options)
    check_source(job)
    if job.data.is_on_hub:
        return hub_source(job, partial(_read_at, job))
    if not ALL_SOURCES.has(job.data.source):
        return brought_source(job, partial(_read_at, job))
    splits = load_source(job.data.source, offline=job.backbone.offline)
    return task_named(job.task.name).from_builtin(splits, job)


def can_be_read_here(job: Job) -> bool:
    """Whether the job's source is known by its name, or is a path at which something lies."""
    return job.data.is_on_hub or job.data.source in ALL_SOURCES or Path(job.data.source).exists()


def _read_at(job: Job, path: Path) -> Table:
    return task_named(job.task.name).read(path, job.data, job.task.options)


def hold_out(table: Table, job: Job) -> tuple[Dataset, Dataset]:
    """(the data for clients, the server's test set), without common examples.

    The test set is the job's `data.test`, or the source's test split, or a fraction of the source chosen by
    content, so that equal examples fall on the same side.
    """
    task = task_named(job.task.name)
    if job.data.test is not None:
        return table.train, task.read(Path(job.data.test), job.data, job.task.options).train
    if table.test is not None:
        return table.train, table.test
    keys = unit_keys(task, table.train)
    order = ranked(keys, job.seed, "test")
    count = round(len(keys) * job.data.test_fraction)
    while 0 < count < len(keys) and keys[order[count - 1]] == keys[order[count]]:
        count += 1
    return table.train.select(sorted(order[count:])), table.train.select(sorted(order[:count]))


def counts_of_source(table: Table, job: Job, train: int, test: int) -> tuple[Counts, ...]:
    """The counts of a source with `train` training examples and `test` held-out ones.

    Raises:
        JobError: the numbers don't add up to all of its examples.
    """
    trainable, apart = len(table.train), len(table.test or ())
    if job.data.test is None:
        whole = Counts("examples", trainable + apart, train + test)
        return table.counts or (whole,)
    whole = Counts("examples", trainable, train)
    unused = {"of the source's test part: data.test is measured on": apart}
    return (*(table.counts or (whole,)), *((Counts("test examples", apart, 0, unused),) if apart else ()))


def unit_keys(task: Task, dataset: Dataset, keys: list[bytes] | None = None) -> list[bytes]:
    """For each row a hash of what must not be split: its example's content, or its group.

    `keys` are the examples' own, where they are known already.
    """
    groups = task.groups(dataset)
    if groups is None:
        return task.keys(dataset) if keys is None else keys
    return [hashlib.sha256(g.encode()).digest() for g in groups]


def server_test_set(job: Job) -> TestSet:
    """The test set of a real federation's server: `data.test`, or the test part of a source it can read.

    Without either the result is None, and the model is evaluated at the clients.
    """

    def test_set(learner: Learner) -> Shard | None:
        if job.data.test is not None:
            table = learner.task.read(Path(job.data.test), job.data, job.task.options)
            return learner.task.shard(table.train, learner.data_info)
        if not can_be_read_here(job):
            logger.info("no test data at the server: the model is measured at the clients")
            return None
        _, test = hold_out(read_source(job), job)
        return learner.task.shard(test, learner.data_info) if len(test) else None

    return test_set
