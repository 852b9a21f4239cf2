"""Split one source over simulated clients, as flwr-datasets' partitioners do.

They make one table a client; here the same rows come out of array operations, for a million clients too.
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
from atoll.sim.population.skew import dirichlet_hands, pathological_hands


def partition(
    table: Dataset, order: Sequence[int], job: Job, groups: Sequence[str] | None = None
) -> Assignment:
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
            dealt = _evenly(deck, clients) if groups is None else _evenly_together(deck, clients, groups)
        case Natural():
            dealt = _by_value(deck, table, rule.by, clients)
        case Resampled():
            return _drawn(deck, table, rule, job)
        case OtherPartition():
            return _brought(deck, table, rule, job)
        case _:
            dealt = _skewed(deck, table, job)
    if not isinstance(rule, Pathological):
        check_all_dealt(dealt, deck)
    return dealt


def check_all_dealt(dealt: FixedAssignment, deck: Rows) -> None:
    """Raises JobError unless each row of the deck is with one client, and with one alone."""
    if not np.array_equal(np.sort(dealt.deck), np.sort(deck)):
        raise JobError(
            f"data.partition: {len(dealt.deck)} rows were dealt, {len(dealt.held())} of them different;"
            f" expected each of the {len(deck)} once"
        )


def _brought(deck: Rows, table: Dataset, rule: OtherPartition, job: Job) -> FixedAssignment:
    """As an extension's function splits it, which sees the examples in the order of the deck.

    Raises:
        ConfigError: it isn't there, its options don't fit, or what it returns is no split.
    """
    extension, options = brought_partition(rule)
    assert extension.thing is not None
    generator = np.random.default_rng(stream_seed(job.seed, "partition", rule.kind))
    clients = job.federation.clients
    returned = extension.thing(table.select(deck), clients, generator, *options)
    where = f"data.partition: {rule.kind} ({extension.origin}) returned"
    if len(returned) != clients:
        raise ConfigError(
            f"{where} {len(returned)} lists of rows, expected one for each of {clients} clients"
        )
    hands = [np.asarray(hand) for hand in returned]
    for client, hand in enumerate(hands):
        if not len(hand):
            raise ConfigError(f"{where} no row for client {client}, expected at least one for each")
        if hand.ndim != 1 or not np.issubdtype(hand.dtype, np.integer):
            raise ConfigError(f"{where} {hand.dtype} for client {client}, expected a list of row numbers")
        if hand.min() < 0 or hand.max() >= len(deck) or len(np.unique(hand)) < len(hand):
            raise ConfigError(
                f"{where} rows for client {client} that are twice there or none of the {len(deck)},"
                f" expected different numbers from 0 to {len(deck) - 1}"
            )
    if "example" in job.privacy.units and len(np.unique(np.concatenate(hands))) < sum(map(len, hands)):
        raise ConfigError(f"data.partition: {rule.kind} ({extension.origin}) {SHARED_EXAMPLES}")
    return FixedAssignment.of([deck[hand] for hand in hands])


def _too_few(count: int, job: Job) -> str:
    if isinstance(job.data.partition, Resampled):
        asked = job.data.partition.examples
        return f"data.partition.examples: found {asked}, expected at most the {count} training examples"
    return (
        f"federation.clients: {job.federation.clients} clients cannot share {count} training examples,"
        ' set fewer, or partition = { kind = "resampled", … } so that clients may share examples'
    )


def _evenly(deck: Rows, clients: int) -> FixedAssignment:
    """As flwr-datasets' IidPartitioner: consecutive runs, the first ones longer by one."""
    size, longer = divmod(len(deck), clients)
    numbers = np.arange(clients + 1)
    return FixedAssignment(deck, numbers * size + np.minimum(numbers, longer))


def _evenly_together(deck: Rows, clients: int, groups: Sequence[str]) -> FixedAssignment:
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
    return FixedAssignment(deck, np.concatenate([[0], starts[cut], [len(deck)]]).astype(np.int64))


def keys_of(table: Dataset, by: str) -> list[int | float] | list[str]:
    """The values of a column that the partition goes by: numbers where all are, else one text for each value.

    Raises:
        ConfigError: there is no such column, or a row has nothing in it.
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
    """Raises ConfigError where a row of a source has nothing by which it could be dealt."""
    by = getattr(rule, "by", None)
    if by is not None and (by in table.column_names or not isinstance(rule, Resampled)):
        keys_of(table, by)


def _by_value(deck: Rows, table: Dataset, by: str, clients: int) -> FixedAssignment:
    """As flwr-datasets' NaturalIdPartitioner: a client for each value, in the order of the values."""
    values, owner = np.unique(np.array(keys_of(table, by))[deck], return_inverse=True)
    if len(values) != clients:
        raise ConfigError(
            f"federation.clients: column {by!r} has {len(values)} values, found clients = {clients}"
        )
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner))]).astype(np.int64)
    return FixedAssignment(deck[np.argsort(owner, kind="stable")], starts)


LISTED = 10_000
"""Clients up to which it is drawn at once what each holds; of more, what the cohort holds every round."""


def _drawn(deck: Rows, table: Dataset, rule: Resampled, job: Job) -> Assignment:
    if rule.alpha is None and rule.by not in table.column_names:
        label = np.zeros(len(deck), dtype=np.int64)
    else:
        label = np.unique(np.array(keys_of(table, rule.by))[deck], return_inverse=True)[1]
    clients = job.federation.clients
    drawn = SampledAssignment(
        deck[np.argsort(label, kind="stable")],
        np.bincount(label),
        clients,
        rule.examples,
        rule.alpha,
        stream_seed(job.seed, "partition"),
    )
    return FixedAssignment.of(drawn.rows(range(clients))) if clients <= LISTED else drawn


def _skewed(deck: Rows, table: Dataset, job: Job) -> FixedAssignment:
    """As flwr-datasets' partitioners deal label skew.

    Raises:
        ConfigError: a client would get no example, or the rule can't be kept.
    """
    rule, clients = job.data.partition, job.federation.clients
    assert isinstance(rule, Dirichlet | Pathological)
    column, seed = keys_of(table, rule.by), stream_seed(job.seed, "partition")
    labels = [column[row] for row in deck.tolist()]
    if isinstance(rule, Dirichlet):
        hands = dirichlet_hands(labels, clients, rule.alpha, least=rule.min_examples, seed=seed)
    else:
        hands = pathological_hands(labels, clients, rule.classes_per_client, seed=seed)
    empty = sum(not hand for hand in hands)
    if empty:
        raise ConfigError(
            f"data.partition: {empty} of {clients} clients would get no example; use fewer clients"
        )
    return FixedAssignment.of([deck[hand] for hand in hands])
