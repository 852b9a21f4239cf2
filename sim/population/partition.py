"""Partitioning one source over simulated clients, with the same results as flwr-datasets' partitioners.

Those make one table per client; here array operations give the same rows, also for a million clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from atoll.data.dataset import Dataset
from atoll.data.labels import value_name
from atoll.errors import ConfigError, JobError
from atoll.job.job import Dirichlet, Iid, Job, Natural, OtherPartition, Partition, Pathological, Resampled
from atoll.job.partitions import brought_partition
from atoll.job.privacy import SHARED_EXAMPLES
from atoll.protocol.random_streams import stream_seed
from atoll.sim.population.assignment import Assignment, FixedAssignment, Rows, SampledAssignment
from atoll.sim.population.skew import dirichlet_partition, pathological_partition


def partition(
    table: Dataset, order: Sequence[int], job: Job, groups: Sequence[str] | None = None
) -> Assignment:
    """The rows of `table` that each client holds, by the job's `data.partition`.

    `order` is the order in which rows are assigned; it depends on their content alone. With `groups` (each
    row's patient, say), an even partition keeps the rows of a group together.

    Raises:
        ConfigError: the data can't be partitioned in this way.
    """
    clients, rule = job.federation.clients, job.data.partition
    if len(order) < (rule.examples if isinstance(rule, Resampled) else clients):
        raise ConfigError(_too_few(len(order), job))
    row_order = np.asarray(order, dtype=np.int64)
    match rule:
        case Iid():
            dealt = (
                _evenly(row_order, clients)
                if groups is None
                else _evenly_together(row_order, clients, groups)
            )
        case Natural():
            dealt = _by_value(row_order, table, rule.by, clients)
        case Resampled():
            return _drawn(row_order, table, rule, job)
        case OtherPartition():
            return _brought(row_order, table, rule, job)
        case _:
            dealt = _skewed(row_order, table, job)
    if not isinstance(rule, Pathological):
        check_all_dealt(dealt, row_order)
    return dealt


def check_all_dealt(dealt: FixedAssignment, row_order: Rows) -> None:
    """Raises JobError unless every row of `row_order` is assigned to exactly one client."""
    if not np.array_equal(np.sort(dealt.row_order), np.sort(row_order)):
        raise JobError(
            f"data.partition: {len(dealt.row_order)} rows were dealt, {len(dealt.held())} of them different;"
            f" expected each of the {len(row_order)} once"
        )


def _brought(row_order: Rows, table: Dataset, rule: OtherPartition, job: Job) -> FixedAssignment:
    """The partition that an extension's function makes of the examples in the order of `row_order`.

    Raises:
        ConfigError: the extension is unknown, its options are invalid, or it returns no valid partition.
    """
    extension, options = brought_partition(rule)
    assert extension.thing is not None
    generator = np.random.default_rng(stream_seed(job.seed, "partition", rule.kind))
    clients = job.federation.clients
    returned = extension.thing(table.select(row_order), clients, generator, *options)
    where = f"data.partition: {rule.kind} ({extension.origin}) returned"
    if len(returned) != clients:
        raise ConfigError(
            f"{where} {len(returned)} lists of rows, expected one for each of {clients} clients"
        )
    rows_by_client = [np.asarray(rows) for rows in returned]
    for client, rows in enumerate(rows_by_client):
        if not len(rows):
            raise ConfigError(f"{where} no row for client {client}, expected at least one for each")
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ConfigError(f"{where} {rows.dtype} for client {client}, expected a list of row numbers")
        if rows.min() < 0 or rows.max() >= len(row_order) or len(np.unique(rows)) < len(rows):
            raise ConfigError(
                f"{where} rows for client {client} that are twice there or none of the {len(row_order)},"
                f" expected different numbers from 0 to {len(row_order) - 1}"
            )
    held = np.concatenate(rows_by_client)
    if "example" in job.privacy.units and len(np.unique(held)) < len(held):
        raise ConfigError(f"data.partition: {rule.kind} ({extension.origin}) {SHARED_EXAMPLES}")
    return FixedAssignment.of([row_order[rows] for rows in rows_by_client])


def _too_few(count: int, job: Job) -> str:
    if isinstance(job.data.partition, Resampled):
        most = job.data.partition.examples
        return f"data.partition.examples: found {most}, expected at most the {count} training examples"
    return (
        f"federation.clients: {job.federation.clients} clients cannot share {count} training examples,"
        ' set fewer, or partition = { kind = "resampled", … } so that clients may share examples'
    )


def _evenly(row_order: Rows, clients: int) -> FixedAssignment:
    """As flwr-datasets' IidPartitioner: consecutive runs of equal length, the first ones longer by one."""
    size, longer = divmod(len(row_order), clients)
    numbers = np.arange(clients + 1)
    return FixedAssignment(row_order, numbers * size + np.minimum(numbers, longer))


def _evenly_together(row_order: Rows, clients: int, groups: Sequence[str]) -> FixedAssignment:
    """Consecutive runs of whole groups, with lengths as even as possible.

    In `row_order` the rows of a group must be consecutive.

    Raises:
        ConfigError: there are fewer groups than clients.
    """
    owner = np.array(groups)[row_order]
    starts = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    if len(starts) < clients:
        raise ConfigError(
            f"federation.clients: {clients} clients cannot share {len(starts)} groups of examples that belong"
            " together, set fewer"
        )
    ends = np.append(starts[1:], len(row_order))
    wanted = np.arange(1, clients) * len(row_order) / clients
    last = np.maximum.accumulate(np.searchsorted(ends, wanted, side="left"))
    # Every client gets at least one group: cuts are moved apart where a group exceeds a client's share.
    number = np.arange(1, clients)
    cut = np.minimum(np.maximum.accumulate(last + 1 - number) + number, len(starts) - (clients - number))
    return FixedAssignment(row_order, np.concatenate([[0], starts[cut], [len(row_order)]]).astype(np.int64))


def keys_of(table: Dataset, by: str) -> list[int | float] | list[str]:
    """The values of the column by which a partition assigns rows: all numbers, or all texts.

    Raises:
        ConfigError: there is no such column, or it is empty in a row.
    """
    if by not in table.column_names:
        raise ConfigError(
            f"data.partition.by: no column {by!r}, found {', '.join(sorted(table.column_names))}"
        )
    values = list(table[by])
    names = [value_name(value) for value in values]
    if missing := [row for row, name in enumerate(names, start=1) if name is None]:
        raise ConfigError(
            f"data.partition.by: column {by!r} is empty in {len(missing)} of {len(names)} rows (the first is"
            f" row {missing[0]}), expected a value in each"
        )
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values
    return [str(name) for name in names]


def check_keys(table: Dataset, rule: Partition) -> None:
    """Raises ConfigError if the column by which the partition assigns rows is missing, or empty in a row."""
    by = getattr(rule, "by", None)
    if by is not None and (by in table.column_names or not isinstance(rule, Resampled)):
        keys_of(table, by)


def _by_value(row_order: Rows, table: Dataset, by: str, clients: int) -> FixedAssignment:
    """As flwr-datasets' NaturalIdPartitioner: one client per value of a column, in the values' order."""
    values, owner = np.unique(np.array(keys_of(table, by))[row_order], return_inverse=True)
    if len(values) != clients:
        raise ConfigError(
            f"federation.clients: column {by!r} has {len(values)} values, found clients = {clients}"
        )
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner))]).astype(np.int64)
    return FixedAssignment(row_order[np.argsort(owner, kind="stable")], starts)


LISTED = 10_000
"""Up to this many clients all rows are sampled in advance; with more, only the cohort's, every round."""


def _drawn(row_order: Rows, table: Dataset, rule: Resampled, job: Job) -> Assignment:
    if rule.alpha is None and rule.by not in table.column_names:
        label = np.zeros(len(row_order), dtype=np.int64)
    else:
        label = np.unique(np.array(keys_of(table, rule.by))[row_order], return_inverse=True)[1]
    clients = job.federation.clients
    drawn = SampledAssignment(
        row_order[np.argsort(label, kind="stable")],
        np.bincount(label),
        clients,
        rule.examples,
        rule.alpha,
        stream_seed(job.seed, "partition"),
    )
    return FixedAssignment.of(drawn.rows(range(clients))) if clients <= LISTED else drawn


def _skewed(row_order: Rows, table: Dataset, job: Job) -> FixedAssignment:
    """A partition with label skew, as flwr-datasets' Dirichlet and pathological partitioners.

    Raises:
        ConfigError: a client would get no example, or the rule can't be satisfied.
    """
    rule, clients = job.data.partition, job.federation.clients
    assert isinstance(rule, Dirichlet | Pathological)
    column, seed = keys_of(table, rule.by), stream_seed(job.seed, "partition")
    labels = [column[row] for row in row_order.tolist()]
    if isinstance(rule, Dirichlet):
        rows_by_client = dirichlet_partition(labels, clients, rule.alpha, least=rule.min_examples, seed=seed)
    else:
        rows_by_client = pathological_partition(labels, clients, rule.classes_per_client, seed=seed)
    empty = sum(not rows for rows in rows_by_client)
    if empty:
        raise ConfigError(
            f"data.partition: {empty} of {clients} clients would get no example; use fewer clients"
        )
    return FixedAssignment.of([row_order[rows] for rows in rows_by_client])
