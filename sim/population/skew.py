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


def dirichlet_hands(
    labels: Sequence[Any], clients: int, alpha: float, *, least: int, seed: int
) -> list[Hand]:
    """Each class cut in Dirichlet(alpha) shares, a share a client (Yurochkin et al. 2019).

    Raises:
        ConfigError: in no attempt every client had `least` examples.
    """
    rng = np.random.default_rng(seed)
    places = _by_class(labels)
    for _ in range(ATTEMPTS):
        hands: list[Hand] = [[] for _ in range(clients)]
        for of_class in places.values():
            shares = rng.dirichlet(np.full(clients, alpha, dtype=np.float64))
            cuts = (np.cumsum(shares) * len(of_class)).astype(int)[:-1]
            for hand, part in zip(hands, np.split(of_class, cuts), strict=True):
                hand.extend(part.tolist())
        if min(map(len, hands)) >= least:
            return _shuffled(hands, rng)
    raise ConfigError(
        f"data.partition: {ATTEMPTS} times some client would have got fewer than min_examples = {least};"
        " expected a larger alpha, fewer clients or a smaller min_examples"
    )


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
    found = np.array(labels)
    return {name: np.flatnonzero(found == name) for name in sorted(set(labels))}


def _shuffled(hands: list[Hand], rng: np.random.Generator) -> list[Hand]:
    for hand in hands:
        rng.shuffle(hand)
    return hands
