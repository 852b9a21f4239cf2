"""Draws in proportion to whole-number weights, by uniform numbers that are given; sums are exact."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.protocol.random_streams import stream

Weights = NDArray[np.int64]
"""What each client weighs in a draw, [clients], at least 0."""

STEPS = 2.0**40
"""Steps of the largest weight in which other numbers become whole ones."""


def uniforms_of(seed: int, purpose: str, round: int, count: int) -> list[float]:
    """Uniform numbers of a round's own stream, from 0 to below 1, [count]."""
    generator = stream(seed, purpose, round)
    drawn: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return drawn


def with_replacement(weights: Weights, uniforms: Sequence[float]) -> list[int]:
    """The place that each uniform number draws, whatever was drawn before; none where all weights are 0.

    >>> with_replacement(np.array([1, 0, 3]), [0.2, 0.25, 0.9])
    [0, 2, 2]
    """
    ends = np.cumsum(weights)
    total = int(ends[-1]) if len(ends) else 0
    return [_place(ends, _target(total, u)) for u in uniforms] if total else []


def without_replacement(weights: Weights, uniforms: Sequence[float]) -> list[int]:
    """The places that uniform numbers draw one after the other, each from those that are left.

    In the order in which they are drawn; fewer, where weights above 0 run out.

    >>> without_replacement(np.array([1, 0, 3]), [0.9, 0.9, 0.9])
    [2, 0]
    """
    ends = np.cumsum(weights)
    left = int(ends[-1]) if len(ends) else 0
    drawn: list[int] = []
    gone: list[tuple[int, int]] = []  # (where its weights began, how many), in order
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
    """Numbers of at least 0 as weights of at least 1: in `STEPS` of the largest; all 1 if none is above 0.

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
