"""Split one source over simulated clients, by flwr-datasets' partitioners."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import datasets
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    PathologicalPartitioner,
)

from protocol.errors import ConfigError
from protocol.job import Dirichlet, Iid, Job, Natural, Pathological
from protocol.streams import stream_seed


def partition(table: datasets.Dataset, order: Sequence[int], job: Job) -> list[list[int]]:
    """Rows of `table` for each client. `order` is how rows are dealt: it depends on content alone.

    Raises:
        ConfigError: the data can't be split that way.
    """
    column = _column(job, table)
    values = table[column]
    deck = datasets.Dataset.from_dict({"row": list(order), column: [values[row] for row in order]})
    partitioner = _partitioner(job, column)
    partitioner.dataset = deck
    clients = job.federation.clients
    if len(order) < clients:
        raise ConfigError(
            f"federation.clients: {clients} clients cannot share {len(order)} training examples, set fewer"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it redraws, and says so at length
            _check_count(partitioner, job)
            shards = [list(partitioner.load_partition(i)["row"]) for i in range(clients)]
    except ValueError as error:
        raise ConfigError(f"data.partition: {_first_sentence(error)}") from None
    empty = sum(not shard for shard in shards)
    if empty:
        raise ConfigError(
            f"data.partition: {empty} of {clients} clients would get no example; use fewer clients"
        )
    return shards


def _column(job: Job, table: datasets.Dataset) -> str:
    rule = job.data.partition
    if not isinstance(rule, Natural):
        return "label"
    if rule.by not in table.column_names:
        raise ConfigError(
            f"data.partition.by: no column {rule.by!r}, found {', '.join(sorted(table.column_names))}"
        )
    return rule.by


def _partitioner(job: Job, column: str) -> Any:
    seed = stream_seed(job.seed, "partition")
    clients = job.federation.clients
    match job.data.partition:
        case Iid():
            return IidPartitioner(clients)
        case Dirichlet(alpha=alpha, min_examples=least):
            return DirichletPartitioner(clients, column, alpha, min_partition_size=least, seed=seed)
        case Pathological(classes_per_client=count):
            return PathologicalPartitioner(clients, column, count, seed=seed)
        case Natural():
            return NaturalIdPartitioner(column)


def _check_count(partitioner: Any, job: Job) -> None:
    if isinstance(job.data.partition, Natural) and partitioner.num_partitions != job.federation.clients:
        raise ConfigError(
            f"federation.clients: column {job.data.partition.by!r} has {partitioner.num_partitions} values,"
            f" found clients = {job.federation.clients}"
        )


def _first_sentence(error: ValueError) -> str:
    return " ".join(str(error).split()).split(". ")[0]
