"""Clients whose classes are skewed, dealt as flwr-datasets' partitioners deal them: the very same hands.

Its own package brings in what it draws plots with and Hugging Face's datasets, which takes longer than a
job's first rounds; and it makes a table a client where places are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.errors import ConfigError

ATTEMPTS = 11
"""Times that Dirichlet shares are drawn until every client has enough examples."""

Hand = list[int]
"""Places among the labels."""

_Places = dict[Any, NDArray[np.int64]]
"""Where each class is found."""


def dirichlet_hands(
    labels: Sequence[Any], clients: int, alpha: float, *, least: int, seed: int
) -> list[Hand]:
    """Each class cut in Dirichlet(alpha) shares, a share a client (Yurochkin et al. 2019).

    Raises:
        ConfigError: in no attempt every client had `least` examples.
    """
    places = _by_class(labels)
    hands = _dirichlet(places, clients, alpha, least, seed)
    if hands is None:
        raise ConfigError(
            f"data.partition.alpha: with {alpha:g} a client got fewer than min_examples = {least} in each of"
            f" {ATTEMPTS} draws; {_what_would_do(places, clients, alpha, least, seed)}"
        )
    return hands


def _what_would_do(places: _Places, clients: int, alpha: float, least: int, seed: int) -> str:
    """An alpha that can be met, of the doubled ones; or which other key keeps all of them from it."""
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


def _dirichlet(places: _Places, clients: int, alpha: float, least: int, seed: int) -> list[Hand] | None:
    """The first draw in which every client has enough, if there is one."""
    rng = np.random.default_rng(seed)
    for _ in range(ATTEMPTS):
        hands: list[Hand] = [[] for _ in range(clients)]
        for of_class in places.values():
            shares = rng.dirichlet(np.full(clients, alpha, dtype=np.float64))
            cuts = (np.cumsum(shares) * len(of_class)).astype(int)[:-1]
            for hand, part in zip(hands, np.split(of_class, cuts), strict=True):
                hand.extend(part.tolist())
        if min(map(len, hands)) >= least:
            return _shuffled(hands, rng)
    return None


def pathological_hands(labels: Sequence[Any], clients: int, classes: int, *, seed: int) -> list[Hand]:
    """Some classes a client, each cut evenly among those that have it (McMahan et al. 2017).

    Raises:
        ConfigError: there are fewer classes, or a class has fewer examples than clients that are to hold it.
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
    hands: list[Hand] = [[] for _ in range(clients)]
    for of_class, having in zip(places.values(), owners, strict=True):
        for client, part in zip(having, np.array_split(of_class, max(len(having), 1)), strict=False):
            hands[client].extend(part.tolist())
    return _shuffled(hands, rng)


def _by_class(labels: Sequence[Any]) -> dict[Any, NDArray[np.int64]]:
    """Where each class is found, class by class in their order."""
    values = np.array(labels)
    return {name: np.flatnonzero(values == name) for name in sorted(set(labels))}


def _shuffled(hands: list[Hand], rng: np.random.Generator) -> list[Hand]:
    for hand in hands:
        rng.shuffle(hand)
    return hands
