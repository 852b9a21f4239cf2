"""Bounding what one unit can contribute: L2 clipping over all tensors together.

Clipping each tensor to the norm on its own would allow a contribution sqrt(tensors) times as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import StackedUpdates, stacked
from atoll.protocol.tensors import Tensors

NUMBERS_PER_BLOCK = 1 << 22
"""Numbers of all clients that are in float64 at a time."""


def clipped_sum(updates: Sequence[Update], *, clipping_norm: float) -> tuple[Tensors, torch.Tensor]:
    """(the sum of the clipped deltas in float64, each client's norm before clipping, [clients]).

    Every client has weight one, whatever number of examples it states. A delta with a value that
    isn't finite counts as zero, and so does its norm: nobody else can see that there was one.

    Raises:
        ValueError: the clipping norm isn't finite and positive.
    """
    if not (math.isfinite(clipping_norm) and clipping_norm > 0):
        raise ValueError(f"clipping_norm must be finite and > 0, got {clipping_norm}")
    cohort = stacked(updates)
    norms = _norms(cohort)
    scale = (clipping_norm / norms.clamp_min(clipping_norm)).masked_fill(~torch.isfinite(norms), 0.0)
    total = {name: _scaled_sum(scale, delta) for name, delta in cohort.delta.items()}
    return total, norms.masked_fill(~torch.isfinite(norms), 0.0)


def _norms(cohort: StackedUpdates) -> torch.Tensor:
    squares = torch.zeros(len(cohort), dtype=torch.float64)
    for delta in cohort.delta.values():
        for part in torch.split(delta.reshape(len(cohort), -1), _columns(len(cohort)), dim=1):
            squares += part.to(torch.float64).square().sum(1)
    return squares.sqrt()


def _scaled_sum(scale: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum over clients of scale times value; a client of scale zero adds nothing, not even NaN."""
    flat = values.reshape(len(values), -1)[scale > 0]
    weights = scale[scale > 0]
    parts = [weights @ part.to(torch.float64) for part in torch.split(flat, _columns(len(values)), dim=1)]
    return torch.cat(parts).reshape(values.shape[1:])


def _columns(clients: int) -> int:
    return max(1, NUMBERS_PER_BLOCK // max(clients, 1))
