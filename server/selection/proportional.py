"""Sampling in proportion to integer weights, from given uniform numbers; integer sums are exact."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.protocol.random_streams import stream

Weights = NDArray[np.int64]
"""Integer weights, at least 0, in proportion to which clients are drawn, [clients]."""

STEPS = 2.0**40
"""The resolution of `in_steps`: floats are rounded down to multiples of the largest one over this number."""


def uniforms_of(seed: int, purpose: str, round: int, count: int) -> list[float]:
    """`count` uniform numbers in [0, 1) from the random stream of this seed, purpose and round."""
    generator = stream(seed, purpose, round)
    drawn: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return drawn


def with_replacement(weights: Weights, uniforms: Sequence[float]) -> list[int]:
    """The index that each uniform number in [0, 1) draws, with replacement; empty if all weights are 0.

    >>> with_replacement(np.array([1, 0, 3]), [0.2, 0.25, 0.9])
    [0, 2, 2]
    """
    ends = np.cumsum(weights)
    total = int(ends[-1]) if len(ends) else 0
    return [_place(ends, _target(total, u)) for u in uniforms] if total else []


def without_replacement(weights: Weights, uniforms: Sequence[float]) -> list[int]:
    """The indices that uniform numbers in [0, 1) draw without replacement, in the order of the draws.

    Fewer, where fewer weights are above 0.

    >>> without_replacement(np.array([1, 0, 3]), [0.9, 0.9, 0.9])
    [2, 0]
    """
    ends = np.cumsum(weights)
    left = int(ends[-1]) if len(ends) else 0
    drawn: list[int] = []
    gone: list[tuple[int, int]] = []  # (where a drawn item's weight started, that weight), in order
    for u in uniforms:
        if left == 0:
            break
        target = _target(left, u)
        for start, weight in gone:
            if target < start:
                break
            target += weight
        place = _place(ends, target)
        weight = int(weights[place])
        insort(gone, (int(ends[place]) - weight, weight))
        left -= weight
        drawn.append(place)
    return drawn


def in_steps(values: NDArray[np.float64]) -> Weights:
    """Floats of at least 0 as integer weights: 1 + floor(value / largest * STEPS); all 1 if none is above 0.

    >>> in_steps(np.array([0.0, 2.0])).tolist() == [1, 2**40 + 1]
    True
    """
    most = float(values.max()) if len(values) else 0.0
    if most == 0:
        return np.ones(len(values), dtype=np.int64)
    return 1 + np.floor(values / most * STEPS).astype(np.int64)


def _target(total: int, uniform: float) -> int:
    return min(int(uniform * total), total - 1)


def _place(ends: NDArray[np.int64], target: int) -> int:
    return int(np.searchsorted(ends, target, side="right"))
