"""Split one source over simulated clients, by flwr-datasets' partitioners or as they do.

Its partitioners make one table a client; where a million clients are usual (IID, natural) the same
rows come out of one array operation here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import datasets
import numpy as np
from flwr_datasets.partitioner import DirichletPartitioner, PathologicalPartitioner

from protocol.errors import ConfigError
from protocol.job import Dirichlet, Iid, Job, Natural, Pathological, Resampled
from protocol.streams import stream_seed
from sim.dealing import Dealing, Dealt, Drawn, Rows


def partition(table: datasets.Dataset, order: Sequence[int], job: Job) -> Dealing:
    """Which rows of `table` each client holds. `order` is how they are dealt: by content alone.

    Raises:
        ConfigError: the data can't be split that way.
    """
    clients, rule = job.federation.clients, job.data.partition
    if len(order) < (rule.examples if isinstance(rule, Resampled) else clients):
        raise ConfigError(_too_few(len(order), job))
    deck = np.asarray(order, dtype=np.int64)
    match rule:
        case Iid():
            return _evenly(deck, clients)
        case Natural():
            return _by_value(deck, table, rule.by, clients)
        case Resampled():
            return _drawn(deck, table, rule, job)
        case _:
            return _by_partitioner(deck, table, job)


def _too_few(count: int, job: Job) -> str:
    if isinstance(job.data.partition, Resampled):
        asked = job.data.partition.examples
        return f"data.partition.examples: found {asked}, expected at most the {count} training examples"
    return (
        f"federation.clients: {job.federation.clients} clients cannot share {count} training examples,"
        ' set fewer, or partition = { kind = "resampled", … } so that clients may share examples'
    )


def _evenly(deck: Rows, clients: int) -> Dealt:
    """As flwr-datasets' IidPartitioner: consecutive runs, the first ones longer by one."""
    size, longer = divmod(len(deck), clients)
    numbers = np.arange(clients + 1)
    return Dealt(deck, numbers * size + np.minimum(numbers, longer))


def _by_value(deck: Rows, table: datasets.Dataset, by: str, clients: int) -> Dealt:
    """As flwr-datasets' NaturalIdPartitioner: a client for each value, in the order of the values."""
    if by not in table.column_names:
        raise ConfigError(
            f"data.partition.by: no column {by!r}, found {', '.join(sorted(table.column_names))}"
        )
    column = np.array(table[by])
    if column.dtype == object:
        missing = sum(value is None for value in column.tolist())
        raise ConfigError(
            f"data.partition.by: column {by!r} is empty in {missing} rows, expected a value in each"
        )
    values, owner = np.unique(column[deck], return_inverse=True)
    if len(values) != clients:
        raise ConfigError(
            f"federation.clients: column {by!r} has {len(values)} values, found clients = {clients}"
        )
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner))]).astype(np.int64)
    return Dealt(deck[np.argsort(owner, kind="stable")], starts)


LISTED = 10_000
"""Clients up to which it is drawn at once what each holds; of more, what the cohort holds every round."""


def _drawn(deck: Rows, table: datasets.Dataset, rule: Resampled, job: Job) -> Dealing:
    _, label = np.unique(np.array(table["label"])[deck], return_inverse=True)
    clients = job.federation.clients
    drawn = Drawn(
        deck[np.argsort(label, kind="stable")],
        np.bincount(label),
        clients,
        rule.examples,
        rule.alpha,
        stream_seed(job.seed, "partition"),
    )
    return Dealt.of(drawn.rows(range(clients))) if clients <= LISTED else drawn


def _by_partitioner(deck: Rows, table: datasets.Dataset, job: Job) -> Dealt:
    labels = table["label"]
    partitioner = _partitioner(job)
    partitioner.dataset = datasets.Dataset.from_dict(
        {"row": deck, "label": [labels[row] for row in deck.tolist()]}
    )
    clients = job.federation.clients
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it redraws, and says so at length
            hands = [list(partitioner.load_partition(i)["row"]) for i in range(clients)]
    except ValueError as error:
        raise ConfigError(f"data.partition: {_first_sentence(error)}") from None
    empty = sum(not hand for hand in hands)
    if empty:
        raise ConfigError(
            f"data.partition: {empty} of {clients} clients would get no example; use fewer clients"
        )
    return Dealt.of(hands)


def _partitioner(job: Job) -> DirichletPartitioner | PathologicalPartitioner:
    seed, clients = stream_seed(job.seed, "partition"), job.federation.clients
    match job.data.partition:
        case Dirichlet(alpha=alpha, min_examples=least):
            return DirichletPartitioner(clients, "label", alpha, min_partition_size=least, seed=seed)
        case Pathological(classes_per_client=count):
            return PathologicalPartitioner(clients, "label", count, seed=seed)
    raise ConfigError(f"data.partition: unknown kind {job.data.partition.kind!r}")


def _first_sentence(error: ValueError) -> str:
    return " ".join(str(error).split()).split(". ")[0]
