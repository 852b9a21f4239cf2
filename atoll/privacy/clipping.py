"""Bounds the contribution of one unit: L2 clipping over all tensors together.

Clipping each tensor to the norm on its own would allow a contribution sqrt(tensors) times as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import StackedUpdates

NUMBERS_PER_BLOCK = 1 << 22
"""How many numbers, of all clients together, are converted to float64 at a time."""


def clipped_sum(updates: Sequence[Update], *, clipping_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(the sum of the clipped deltas, [numbers], float64; each client's norm before clipping, [clients]).

    The sum has all tensors behind one another, in the order of their names. Every client has weight one,
    whatever number of examples it reports. A delta with a value that isn't finite counts as zero, and so does
    its norm, so that the result does not reveal that there was one.

    Raises:
        ValueError: the clipping norm isn't finite and positive.
    """
    if not (math.isfinite(clipping_norm) and clipping_norm > 0):
        raise ValueError(f"clipping_norm must be finite and > 0, got {clipping_norm}")
    shapes = _shapes(updates)
    norms = _norms(updates, shapes)
    scale = (clipping_norm / norms.clamp_min(clipping_norm)).masked_fill(~torch.isfinite(norms), 0.0)
    names = sorted(shapes)
    sizes = [shapes[name].numel() for name in names]
    total = torch.empty(sum(sizes), dtype=torch.float64)
    for name, part in zip(names, torch.split(total, sizes), strict=True):
        _write_scaled_sum(scale, updates, name, part)
    return total, norms.masked_fill(~torch.isfinite(norms), 0.0)


def _shapes(updates: Sequence[Update]) -> dict[str, torch.Size]:
    """The shape of each tensor of one client, by name."""
    if isinstance(updates, StackedUpdates):
        return {name: stack.shape[1:] for name, stack in updates.delta.items()}
    return {name: tensor.shape for name, tensor in updates[0].delta.items()}


def _norms(updates: Sequence[Update], names: Iterable[str]) -> torch.Tensor:
    squares = torch.zeros(len(updates), dtype=torch.float64)
    for name in names:
        for block in _blocks(updates, name, range(len(updates))):
            squares += block.square().sum(1)
    return squares.sqrt()


def _write_scaled_sum(scale: torch.Tensor, updates: Sequence[Update], name: str, into: torch.Tensor) -> None:
    """Write the sum over clients of scale times value; a client with scale 0 adds nothing, not even NaN."""
    counted = [place for place, factor in enumerate(scale.tolist()) if factor > 0]
    weights = scale[scale > 0]
    places = torch.split(into, _columns(len(updates)))
    for place, block in zip(places, _blocks(updates, name, counted), strict=True):
        place.copy_(weights @ block)


def _blocks(updates: Sequence[Update], name: str, places: Sequence[int]) -> Iterator[torch.Tensor]:
    """One tensor of the updates at `places`, in float64 blocks of [places, numbers]."""
    columns = _columns(len(updates))
    if isinstance(updates, StackedUpdates):
        flat = updates.delta[name].reshape(len(updates), -1)
        chosen = flat if len(places) == len(updates) else flat[list(places)]
        yield from (part.to(torch.float64) for part in torch.split(chosen, columns, dim=1))
        return
    apart = [torch.split(update.delta[name].reshape(-1), columns) for update in updates]
    for number in range(len(apart[0])):
        block = torch.empty(len(places), len(apart[0][number]), dtype=torch.float64)
        for row, place in zip(block, places, strict=True):
            row.copy_(apart[place][number])
        yield block


def _columns(clients: int) -> int:
    return max(1, NUMBERS_PER_BLOCK // max(clients, 1))
