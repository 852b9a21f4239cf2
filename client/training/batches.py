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
    """The rows of every batch in a round's local epochs or steps; each epoch is a new permutation.

    The last batch of an epoch may be smaller; no row is dropped. With `chances` [count], each epoch draws
    `count` rows with replacement, with these probabilities.
    """
    size, begun = job.train.batch_size, job.train.epochs_begun(count)
    seeds = (epoch_seeds(job, round, [client], epoch) for epoch in range(begun))
    epochs = (
        permutations([count], seed)[0] if chances is None else weighted_sample(chances, seed)
        for seed in seeds
    )
    by_batch = [order[start : start + size].tolist() for order in epochs for start in range(0, count, size)]
    return by_batch[: job.train.steps]


def epoch_seeds(
    job: Job, round: int, clients: Sequence[str], epoch: int, purpose: str = "shuffle"
) -> NDArray[np.uint64]:
    """The seed of each client's permutation, or of another `purpose`, in one local epoch, [clients].

    It mixes a number of the client with one of the epoch, so that a cohort needs one hash for each epoch.
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
    """Random permutations, [len(counts), max(counts)]: row i begins with one of range(counts[i]).

    The entries after it have no meaning. A permutation depends on its own count and seed alone.
    """
    longest = max(counts)
    numbers = random_numbers(np.array(seeds, dtype=np.uint64), longest)
    beyond = np.arange(longest)[None, :] >= np.array(counts)[:, None]
    # Places beyond the count sort behind all others, whatever their numbers are.
    return np.lexsort((numbers, beyond), axis=1)


def weighted_sample(chances: NDArray[np.float64], seed: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Row numbers [count], drawn with replacement with probabilities `chances` [count]; `seed` is [1]."""
    count = len(chances)
    places = np.searchsorted(np.cumsum(chances), uniform_numbers(seed, count)[0], side="right")
    # A sum of chances may end just below one.
    rows: NDArray[np.int64] = places.clip(max=count - 1).astype(np.int64)
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
    """Write one epoch's batches into the schedule after the earlier epochs, as far as there is room.

    Clients with equally many examples are written together.
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
