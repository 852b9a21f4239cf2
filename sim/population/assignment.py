"""Which rows of the source each simulated client holds: dealt once, or drawn when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.client.training.batches import random_numbers, uniform_numbers
from atoll.protocol.random_streams import stream_seed

Rows = NDArray[np.int64]

CLIENTS_PER_BLOCK = 256
"""Clients whose draws are in memory together."""


class Assignment(Protocol):
    """Rows of the training table by the clients' numbers."""

    @property
    def sizes(self) -> Rows:
        """How many rows each client holds, [clients]; where they are drawn, how many at most."""
        ...

    def rows(self, clients: Sequence[int]) -> list[Rows]:
        """The rows of each of those clients, in the order they were dealt."""
        ...


@dataclass(frozen=True)
class FixedAssignment:
    """Client i holds `deck[starts[i]:starts[i + 1]]`."""

    deck: Rows
    starts: Rows

    @classmethod
    def of(cls, hands: Sequence[Sequence[int] | Rows]) -> FixedAssignment:
        """Each client's rows, one behind the other."""
        starts = np.concatenate([[0], np.cumsum([len(hand) for hand in hands])]).astype(np.int64)
        return cls(np.concatenate([np.asarray(hand, dtype=np.int64) for hand in hands]), starts)

    @property
    def sizes(self) -> Rows:
        return np.diff(self.starts)

    def held(self) -> Rows:
        """The rows that some client holds, sorted."""
        return np.unique(self.deck)

    def among(self, held: Rows) -> FixedAssignment:
        """The same hands from a table of those rows alone."""
        return FixedAssignment(np.searchsorted(held, self.deck), self.starts)

    def rows(self, clients: Sequence[int]) -> list[Rows]:
        return [self.deck[self.starts[i] : self.starts[i + 1]] for i in clients]


@dataclass(frozen=True)
class SampledAssignment:
    """Every client draws `examples` different rows of the source, from a stream of its own.

    `deck` holds all rows, those of one class behind another's; class c has `counts[c]` of them.
    With `alpha` a client's class shares are Dirichlet(alpha) times the source's number of classes
    evenly; without it every row is as likely as another. Nothing is kept of a client.
    """

    deck: Rows
    counts: Rows
    clients: int
    examples: int
    alpha: float | None
    seed: int

    @property
    def sizes(self) -> Rows:
        return np.full(self.clients, self.examples, dtype=np.int64)

    def rows(self, clients: Sequence[int]) -> list[Rows]:
        return [rows for part in batched(clients, CLIENTS_PER_BLOCK) for rows in self._rows(part)]

    def _rows(self, clients: Sequence[int]) -> list[Rows]:
        numbers = np.array(clients, dtype=np.uint64) ^ np.uint64(stream_seed(self.seed, "shard"))
        seeds = random_numbers(numbers, 1)[:, 0]
        # More than are needed, for rows that come twice count once.
        draws = 2 * self.examples + 8
        classes = 0 if self.alpha is None else len(self.counts)
        uniform = uniform_numbers(seeds, 2 * classes + 2 * draws)
        place = self._places(uniform[:, : 2 * classes], uniform[:, 2 * classes :])
        drawn = self.deck[place]
        ordered = np.sort(drawn[:, : self.examples], axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        return [
            _first_different(line, self.examples) if again else line[: self.examples]
            for line, again in zip(drawn, twice.tolist(), strict=True)
        ]

    def _places(self, shares: NDArray[np.float64], draws: NDArray[np.float64]) -> Rows:
        """Places in the deck, [clients, draws]."""
        if self.alpha is None:
            return (draws[:, ::2] * len(self.deck)).astype(np.int64)
        ends = np.cumsum(dirichlet(shares, self.alpha), axis=1)
        drawn = (draws[:, ::2, None] * ends[:, None, -1:] >= ends[:, None, :-1]).sum(axis=2)
        start = np.cumsum(self.counts) - self.counts
        within: Rows = (draws[:, 1::2] * self.counts[drawn]).astype(np.int64)
        places: Rows = start[drawn] + within
        return places


def dirichlet(uniform: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Symmetric Dirichlet(alpha) shares, [rows, classes], from uniform numbers [rows, 2 * classes].

    Normalised Gamma(alpha) numbers, taken as Gamma(alpha + 1) U^(1 / alpha) (Marsaglia and Tsang
    2000, section 6), in logarithms: for a small alpha all of them are otherwise rounded to zero.
    """
    from scipy.special import gammaincinv  # takes a second to import, and few jobs draw so

    classes = uniform.shape[1] // 2
    gamma = gammaincinv(alpha + 1, uniform[:, :classes])
    with np.errstate(divide="ignore"):
        log = np.log(gamma) + np.log(uniform[:, classes:]) / alpha
    weights = np.exp(log - log.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def batched(clients: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive slices of at most that size."""
    return [clients[start : start + size] for start in range(0, len(clients), size)]


def _first_different(rows: Rows, count: int) -> Rows:
    """The first `count` different values, in the order in which they came."""
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)[:count]]
