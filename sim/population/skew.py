"""Partitions with label skew, with exactly the same results as flwr-datasets' partitioners.

flwr-datasets isn't used because it imports plotting packages and Hugging Face's datasets, which takes longer
than a job's first rounds, and because it makes one table per client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import ConfigError

ATTEMPTS = 11
"""How often Dirichlet shares are drawn at most, until every client has enough examples."""

Indices = list[int]
"""Indices into the labels."""

_Places = dict[Any, NDArray[np.int64]]
"""The indices of each class's examples."""


def dirichlet_partition(
    labels: Sequence[Any], clients: int, alpha: float, *, least: int, seed: int
) -> list[Indices]:
    """Divide each class among clients in Dirichlet(alpha) shares (Yurochkin et al. 2019).

    Returns each client's indices into `labels`.

    Raises:
        ConfigError: in no attempt did every client get `least` examples.
    """
    places = _by_class(labels)
    rows_by_client = _dirichlet(places, clients, alpha, least, seed)
    if rows_by_client is None:
        raise ConfigError(
            f"data.partition.alpha: with {alpha:g} a client got fewer than min_examples = {least} in each of"
            f" {ATTEMPTS} draws; {_what_would_do(places, clients, alpha, least, seed)}"
        )
    return rows_by_client


def _what_would_do(places: _Places, clients: int, alpha: float, least: int, seed: int) -> str:
    """A hint for the error message: a larger alpha that works, or other keys to change if none does."""
    whole = sum(map(len, places.values()))
    if whole < clients * least:
        return (
            f"{whole} examples are too few for {clients} clients with so many each: federation.clients ="
            f" {whole // least} would do at best, or data.partition.min_examples = {whole // clients}"
        )
    for larger in (alpha * 2**times for times in range(1, 16)):
        if _dirichlet(places, clients, larger, least, seed) is not None:
            return f"{larger:g} would do, or fewer federation.clients, or smaller data.partition.min_examples"
    return "expected fewer federation.clients or smaller data.partition.min_examples"


def _dirichlet(places: _Places, clients: int, alpha: float, least: int, seed: int) -> list[Indices] | None:
    """The first draw in which every client has `least` examples; None if there is none."""
    rng = np.random.default_rng(seed)
    for _ in range(ATTEMPTS):
        rows_by_client: list[Indices] = [[] for _ in range(clients)]
        for of_class in places.values():
            shares = rng.dirichlet(np.full(clients, alpha, dtype=np.float64))
            cuts = (np.cumsum(shares) * len(of_class)).astype(int)[:-1]
            for rows, part in zip(rows_by_client, np.split(of_class, cuts), strict=True):
                rows.extend(part.tolist())
        if min(map(len, rows_by_client)) >= least:
            return _shuffled(rows_by_client, rng)
    return None


def pathological_partition(labels: Sequence[Any], clients: int, classes: int, *, seed: int) -> list[Indices]:
    """Give each client `classes` random classes, and divide each class evenly (McMahan et al. 2017).

    Returns each client's indices into `labels`.

    Raises:
        ConfigError: there are fewer classes, or a class has fewer examples than clients to share it.
    """
    rng = np.random.default_rng(seed)
    places = _by_class(labels)
    if classes > len(places):
        raise ConfigError(
            f"data.partition.classes_per_client: expected at most the {len(places)} classes there are, found"
            f" {classes}"
        )
    chosen = [set(rng.choice(len(places), size=classes, replace=False).tolist()) for _ in range(clients)]
    owners = [[i for i in range(clients) if number in chosen[i]] for number in range(len(places))]
    for (name, of_class), having in zip(places.items(), owners, strict=True):
        if len(having) > len(of_class):
            raise ConfigError(
                f"data.partition: {len(having)} clients are to share the {len(of_class)} examples of class"
                f" {name!r}; expected fewer clients, or fewer classes_per_client"
            )
    rows_by_client: list[Indices] = [[] for _ in range(clients)]
    for of_class, having in zip(places.values(), owners, strict=True):
        for client, part in zip(having, np.array_split(of_class, max(len(having), 1)), strict=False):
            rows_by_client[client].extend(part.tolist())
    return _shuffled(rows_by_client, rng)


def _by_class(labels: Sequence[Any]) -> dict[Any, NDArray[np.int64]]:
    """The indices of each class's examples, in the order of the classes."""
    values = np.array(labels)
    return {name: np.flatnonzero(values == name) for name in sorted(set(labels))}


def _shuffled(rows_by_client: list[Indices], rng: np.random.Generator) -> list[Indices]:
    for rows in rows_by_client:
        rng.shuffle(rows)
    return rows_by_client
