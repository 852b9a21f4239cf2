"""Which rows of the source each simulated client holds: fixed in advance, or sampled when needed."""

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
"""The number of clients whose random draws are in memory at once."""


class Assignment(Protocol):
    """Maps each client's number to its rows of the training table."""

    @property
    def sizes(self) -> Rows:
        """The number of rows of each client, [clients]; if rows are sampled, the most it can have."""
        ...

    def rows(self, clients: Sequence[int]) -> list[Rows]:
        """The row numbers of each of these clients, in the order in which they were assigned."""
        ...


@dataclass(frozen=True)
class FixedAssignment:
    """Client i holds `row_order[starts[i]:starts[i + 1]]`."""

    row_order: Rows
    starts: Rows

    @classmethod
    def of(cls, rows_by_client: Sequence[Sequence[int] | Rows]) -> FixedAssignment:
        """The assignment in which client i holds `rows_by_client[i]`."""
        starts = np.concatenate([[0], np.cumsum([len(rows) for rows in rows_by_client])]).astype(np.int64)
        return cls(np.concatenate([np.asarray(rows, dtype=np.int64) for rows in rows_by_client]), starts)

    @property
    def sizes(self) -> Rows:
        return np.diff(self.starts)

    def held(self) -> Rows:
        """The rows that any client holds, sorted."""
        return np.unique(self.row_order)

    def among(self, held: Rows) -> FixedAssignment:
        """The same assignment for a table of only the rows `held`, which must be sorted."""
        return FixedAssignment(np.searchsorted(held, self.row_order), self.starts)

    def rows(self, clients: Sequence[int]) -> list[Rows]:
        return [self.row_order[self.starts[i] : self.starts[i + 1]] for i in clients]


@dataclass(frozen=True)
class SampledAssignment:
    """Every client holds `examples` different rows of the source, sampled from a random stream of its own.

    `row_order` has all rows sorted by class; class c has `counts[c]` of them. With `alpha`, a client's class
    proportions are drawn from a symmetric Dirichlet(alpha) distribution; without, every row is equally
    likely. Nothing is stored for a client: its rows are sampled again whenever they are needed.
    """

    row_order: Rows
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
        # More than are needed, because duplicates are dropped.
        draws = 2 * self.examples + 8
        classes = 0 if self.alpha is None else len(self.counts)
        uniform = uniform_numbers(seeds, 2 * classes + 2 * draws)
        place = self._places(uniform[:, : 2 * classes], uniform[:, 2 * classes :])
        drawn = self.row_order[place]
        ordered = np.sort(drawn[:, : self.examples], axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        return [
            _first_different(line, self.examples) if again else line[: self.examples]
            for line, again in zip(drawn, twice.tolist(), strict=True)
        ]

    def _places(self, shares: NDArray[np.float64], draws: NDArray[np.float64]) -> Rows:
        """Indices into `row_order`, [clients, draws]."""
        if self.alpha is None:
            return (draws[:, ::2] * len(self.row_order)).astype(np.int64)
        ends = np.cumsum(dirichlet(shares, self.alpha), axis=1)
        drawn = (draws[:, ::2, None] * ends[:, None, -1:] >= ends[:, None, :-1]).sum(axis=2)
        start = np.cumsum(self.counts) - self.counts
        within: Rows = (draws[:, 1::2] * self.counts[drawn]).astype(np.int64)
        places: Rows = start[drawn] + within
        return places


def dirichlet(uniform: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Symmetric Dirichlet(alpha) samples, [rows, classes], from uniform numbers [rows, 2 * classes].

    They are normalised Gamma(alpha) numbers, computed as Gamma(alpha + 1) U^(1 / alpha) (Marsaglia and Tsang
    2000, section 6), in logarithms, since for a small alpha all of them would be rounded to zero.
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
    """Consecutive slices of at most `size` clients."""
    return [clients[start : start + size] for start in range(0, len(clients), size)]


def _first_different(rows: Rows, count: int) -> Rows:
    """The first `count` different values, in their original order."""
    _, first = np.unique(rows, return_index=True)
    return rows[np.sort(first)[:count]]
