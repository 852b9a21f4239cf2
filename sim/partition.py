"""Split one source over simulated clients, by flwr-datasets' partitioners or as they do.

Its partitioners make one table a client; where a million clients are usual (IID, natural) the same
rows come out of one array operation here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import datasets
import numpy as np

from protocol.errors import ConfigError
from protocol.job import Dirichlet, Iid, Job, Natural, Pathological, Resampled
from protocol.streams import stream_seed
from sim.dealing import Dealing, Dealt, Drawn, Rows

if TYPE_CHECKING:
    from flwr_datasets.partitioner import DirichletPartitioner, PathologicalPartitioner


def partition(
    table: datasets.Dataset, order: Sequence[int], job: Job, groups: Sequence[str] | None = None
) -> Dealing:
    """Which rows of `table` each client holds. `order` is how they are dealt: by content alone.

    Rows of one of the `groups` (a patient, say) stay together, where they are dealt evenly.

    Raises:
        ConfigError: the data can't be split that way.
    """
    clients, rule = job.federation.clients, job.data.partition
    if len(order) < (rule.examples if isinstance(rule, Resampled) else clients):
        raise ConfigError(_too_few(len(order), job))
    deck = np.asarray(order, dtype=np.int64)
    match rule:
        case Iid():
            return _evenly(deck, clients) if groups is None else _evenly_together(deck, clients, groups)
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


def _evenly_together(deck: Rows, clients: int, groups: Sequence[str]) -> Dealt:
    """Runs of as even a length as whole groups allow; `deck` has each group's rows side by side.

    Raises:
        ConfigError: there are fewer groups than clients.
    """
    owner = np.array(groups)[deck]
    starts = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    if len(starts) < clients:
        raise ConfigError(
            f"federation.clients: {clients} clients cannot share {len(starts)} groups of examples that belong"
            " together, set fewer"
        )
    ends = np.append(starts[1:], len(deck))
    wanted = np.arange(1, clients) * len(deck) / clients
    last = np.maximum.accumulate(np.searchsorted(ends, wanted, side="left"))
    # Every client gets a group of its own: cuts move apart where a group is longer than a share.
    number = np.arange(1, clients)
    cut = np.minimum(np.maximum.accumulate(last + 1 - number) + number, len(starts) - (clients - number))
    return Dealt(deck, np.concatenate([[0], starts[cut], [len(deck)]]).astype(np.int64))


def _column(table: datasets.Dataset, by: str) -> list[object]:
    """The values of a column that the partition goes by.

    Raises:
        ConfigError: there is none of that name.
    """
    if by not in table.column_names:
        raise ConfigError(
            f"data.partition.by: no column {by!r}, found {', '.join(sorted(table.column_names))}"
        )
    return list(table[by])


def _by_value(deck: Rows, table: datasets.Dataset, by: str, clients: int) -> Dealt:
    """As flwr-datasets' NaturalIdPartitioner: a client for each value, in the order of the values."""
    column = np.array(_column(table, by))
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
    if rule.alpha is None and rule.by not in table.column_names:
        label = np.zeros(len(deck), dtype=np.int64)
    else:
        label = np.unique(np.array(_column(table, rule.by))[deck], return_inverse=True)[1]
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
    rule = job.data.partition
    assert isinstance(rule, Dirichlet | Pathological)
    labels = _column(table, rule.by)
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
    # Here, for it brings in what it draws plots with, which takes a second.
    from flwr_datasets.partitioner import DirichletPartitioner, PathologicalPartitioner

    seed, clients = stream_seed(job.seed, "partition"), job.federation.clients
    match job.data.partition:
        case Dirichlet(alpha=alpha, min_examples=least):
            return DirichletPartitioner(clients, "label", alpha, min_partition_size=least, seed=seed)
        case Pathological(classes_per_client=count):
            return PathologicalPartitioner(clients, "label", count, seed=seed)
    raise ConfigError(f"data.partition: unknown kind {job.data.partition.kind!r}")


def _first_sentence(error: ValueError) -> str:
    return " ".join(str(error).split()).split(". ")[0]
