"""The order of a client's examples in a round: from the client's own stream, the same everywhere.

A permutation is the order of counter-based random numbers (splitmix64, Steele et al. 2014),
one for each row, so that those of a whole cohort come out of one array operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atoll.job.job import Job
from atoll.protocol.random_streams import stream_seed

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1, MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def batches(
    count: int, job: Job, round: int, client: str, chances: NDArray[np.float64] | None = None
) -> list[list[int]]:
    """Rows of every batch of a round's local epochs, or steps; each epoch is a fresh permutation.

    The last batch of an epoch may be smaller; no row is dropped. With `chances` [count] an epoch draws as
    many rows by them, with replacement.
    """
    size, begun = job.train.batch_size, job.train.epochs_begun(count)
    seeds = (epoch_seeds(job, round, [client], epoch) for epoch in range(begun))
    epochs = (
        permutations([count], own)[0] if chances is None else weighted_sample(chances, own) for own in seeds
    )
    found = [order[start : start + size].tolist() for order in epochs for start in range(0, count, size)]
    return found[: job.train.steps]


def epoch_seeds(
    job: Job, round: int, clients: Sequence[str], epoch: int, purpose: str = "shuffle"
) -> NDArray[np.uint64]:
    """The seed of each client's permutation in one local epoch, or of what else is drawn in it, [clients].

    A client's is its own number mixed with one of the epoch, so that a cohort's take one hash together.
    """
    number = np.uint64(stream_seed(job.seed, purpose, round, epoch))
    mixed: NDArray[np.uint64] = random_numbers(_numbers(clients) ^ number, 1)[:, 0]
    return mixed


def sample_views(views: int, seeds: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """The view of each of `count` examples, drawn evenly from `views` with each seed, [len(seeds), count]."""
    return (random_numbers(seeds, count) % np.uint64(views)).astype(np.int64)


def _numbers(clients: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([_number(client) for client in clients], dtype=np.uint64)


@lru_cache(maxsize=1 << 14)
def _number(client: str) -> int:
    return stream_seed(0, "client", client)


def permutations(counts: Sequence[int], seeds: Sequence[int] | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Row i starts with a permutation of range(counts[i]); what stands behind it has no meaning.

    A permutation depends on its own count and seed alone. Shape [len(counts), max(counts)].
    """
    longest = max(counts)
    numbers = random_numbers(np.array(seeds, dtype=np.uint64), longest)
    beyond = np.arange(longest)[None, :] >= np.array(counts)[:, None]
    # Places beyond the count sort behind all others, whatever their numbers are.
    return np.lexsort((numbers, beyond), axis=1)


def weighted_sample(chances: NDArray[np.float64], seed: NDArray[np.uint64]) -> NDArray[np.int64]:
    """As many rows as there are `chances` [count], drawn by them with replacement; `seed` is [1]."""
    count = len(chances)
    found = np.searchsorted(np.cumsum(chances), uniform_numbers(seed, count)[0], side="right")
    # A sum of chances may end just below one.
    rows: NDArray[np.int64] = found.clip(max=count - 1).astype(np.int64)
    return rows


def random_numbers(seeds: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The first `count` outputs of splitmix64 from each seed, [len(seeds), count]."""
    z = seeds[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64)[None, :]
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def uniform_numbers(seeds: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """The first `count` numbers in [0, 1) from each seed, 53 bits of an output each, [len(seeds), count]."""
    numbers: NDArray[np.float64] = (random_numbers(seeds, count) >> np.uint64(11)).astype(np.float64)
    return numbers * 2.0**-53


def fill_schedule(
    rows: NDArray[np.int64],
    share: NDArray[np.float32],
    shuffled: NDArray[np.int64],
    counts: NDArray[np.int64],
    batch: int,
    epoch: int,
) -> None:
    """Write one epoch's batches behind the epochs before it, as far as there is room for them.

    Clients of equal count are written all at once.
    """
    for count in np.unique(counts).tolist():
        members = np.flatnonzero(counts == count)
        steps = -(-count // batch)
        filled = np.zeros((len(members), steps * batch), dtype=np.int64)
        filled[:, :count] = shuffled[members, :count]
        filled[:, count:] = shuffled[members, :1]
        weights = np.zeros(steps * batch, dtype=np.float32)
        weights[:count] = 1.0 / batch
        weights[(steps - 1) * batch : count] = 1.0 / (count - (steps - 1) * batch)
        span = slice(epoch * steps, (epoch + 1) * steps)
        room = max(0, rows.shape[1] - span.start)
        rows[members, span, :batch] = filled.reshape(-1, steps, batch)[:, :room]
        share[members, span, :batch] = weights.reshape(steps, batch)[:room]
