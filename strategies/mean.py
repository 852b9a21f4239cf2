"""The mean of the clients' deltas, weighted by how much data moved them.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from protocol.cohort import stacked
from protocol.errors import InconsistentUpdates
from protocol.messages import Update
from protocol.tensors import Tensors


def weighted_mean(updates: Sequence[Update]) -> Tensors:
    """Deltas averaged by example count, in float64.

    The sum runs over the stacked updates in the order given, so the same updates in the same
    order give the same bits, whether they arrived one by one or trained as one cohort.

    Raises:
        InconsistentUpdates: there is no update, or none has an example.
    """
    cohort = stacked(updates) if len(updates) else None
    total = sum(cohort.num_examples) if cohort else 0
    if cohort is None or total == 0:
        raise InconsistentUpdates("no examples behind any update: nothing to average")
    weights = torch.tensor(cohort.num_examples, dtype=torch.float64)
    return {name: _weighted_sum(weights, delta) / total for name, delta in cohort.delta.items()}


COLUMNS = 1 << 16
"""Values of a client that are summed in float64 at a time: memory stays bounded for large models."""


def _weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum over the first dimension, [clients, …] to […], in float64."""
    flat = values.reshape(len(values), -1)
    parts = [weights @ part.to(torch.float64) for part in torch.split(flat, COLUMNS, dim=1)]
    return torch.cat(parts).reshape(values.shape[1:])


def moved(model: Tensors, step: Tensors) -> Tensors:
    """The model after a float64 step, each tensor in its own dtype again."""
    return {name: (p.to(torch.float64) + step[name]).to(p.dtype) for name, p in model.items()}
