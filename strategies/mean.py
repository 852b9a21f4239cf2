"""The mean of the clients' deltas, weighted by how much data moved them.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from protocol.cohort import StackedUpdates
from protocol.errors import InconsistentUpdates
from protocol.messages import Update
from protocol.tensors import Tensors


def weighted_mean(updates: Sequence[Update]) -> Tensors:
    """Deltas averaged by example count, in float64.

    The sum runs over the updates in the order given, so the same updates in the same
    order give the same bits, whether they arrived one by one or trained as one cohort.

    Raises:
        InconsistentUpdates: there is no update, or none has an example.
    """
    counts = (
        updates.num_examples if isinstance(updates, StackedUpdates) else [u.num_examples for u in updates]
    )
    total = sum(counts)
    if total == 0:
        raise InconsistentUpdates("no examples behind any update: nothing to average")
    weights = torch.tensor(counts, dtype=torch.float64)
    if isinstance(updates, StackedUpdates):
        return {name: _of_stack(weights, delta) / total for name, delta in updates.delta.items()}
    return {name: _of_each(weights, [u.delta[name] for u in updates]) / total for name in updates[0].delta}


BLOCK = 1 << 16
"""Values of all clients that are summed in float64 at a time: they stay in the processor's cache."""


def _of_stack(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the first dimension, [clients, …] to […], in float64."""
    parts = torch.split(values.reshape(len(values), -1), _columns(weights), dim=1)
    return torch.cat([_weighted_sum(weights, part) for part in parts]).reshape(values.shape[1:])


def _of_each(weights: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same of one tensor a client, which are stacked a block at a time: a large model only once."""
    parts = zip(*(torch.split(v.reshape(-1), _columns(weights)) for v in values), strict=True)
    return torch.cat([_weighted_sum(weights, torch.stack(part)) for part in parts]).reshape(values[0].shape)


def _columns(weights: torch.Tensor) -> int:
    return max(1, BLOCK // len(weights))


def _weighted_sum(weights: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[clients, columns] to [columns]."""
    return weights @ block.to(torch.float64)


def moved(model: Tensors, step: Tensors) -> Tensors:
    """The model after a float64 step, each tensor in its own dtype again."""
    return {name: (p.to(torch.float64) + step[name]).to(p.dtype) for name, p in model.items()}
