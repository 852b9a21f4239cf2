"""The order of a client's examples in a round: from the client's own stream, the same everywhere.

A permutation is the order of counter-based random numbers (splitmix64, Steele et al. 2014),
one for each row, so that those of a whole cohort come out of one array operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.job import Job
from protocol.streams import stream_seed

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1, MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def batches(count: int, job: Job, round: int, client: str) -> list[list[int]]:
    """Rows of every batch of a round's local epochs; each epoch is a fresh permutation.

    The last batch of an epoch may be smaller; no row is dropped.
    """
    size = job.train.batch_size
    epochs = (permutations([count], [s])[0] for s in epoch_seeds(job, round, client))
    return [order[start : start + size].tolist() for order in epochs for start in range(0, count, size)]


def epoch_seeds(job: Job, round: int, client: str, purpose: str = "shuffle") -> list[int]:
    """The seed of each local epoch's permutation, or of what else is drawn in every epoch."""
    return [stream_seed(job.seed, purpose, round, client, epoch) for epoch in range(job.train.epochs)]


def view_numbers(views: int, seeds: Sequence[int], count: int) -> NDArray[np.int64]:
    """The view of each of `count` examples, drawn evenly from `views` with each seed, [len(seeds), count]."""
    numbers = random_numbers(np.array(seeds, dtype=np.uint64), count)
    return (numbers % np.uint64(views)).astype(np.int64)


def permutations(counts: Sequence[int], seeds: Sequence[int]) -> NDArray[np.int64]:
    """Row i starts with a permutation of range(counts[i]); what stands behind it has no meaning.

    A permutation depends on its own count and seed alone. Shape [len(counts), max(counts)].
    """
    longest = max(counts)
    numbers = random_numbers(np.array(seeds, dtype=np.uint64), longest)
    beyond = np.arange(longest)[None, :] >= np.array(counts)[:, None]
    # Places beyond the count sort behind all others, whatever their numbers are.
    return np.lexsort((numbers, beyond), axis=1)


def random_numbers(seeds: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """The first `count` outputs of splitmix64 from each seed, [len(seeds), count]."""
    z = seeds[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64)[None, :]
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
