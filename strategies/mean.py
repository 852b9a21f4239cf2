"""The mean of the clients' deltas, weighted by how much data moved them.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from protocol.errors import InconsistentUpdates
from protocol.messages import Update
from protocol.tensors import Tensors


def weighted_mean(updates: Iterable[Update]) -> Tensors:
    """Deltas averaged by example count, in float64, one update in memory at a time.

    Raises:
        InconsistentUpdates: there is no update, or none has an example.
    """
    total: Tensors = {}
    weight = 0
    for update in updates:
        for name, delta in update.delta.items():
            term = delta.to(torch.float64) * update.num_examples
            total[name] = total[name] + term if name in total else term
        weight += update.num_examples
    if weight == 0:
        raise InconsistentUpdates("no examples behind any update: nothing to average")
    return {name: value / weight for name, value in total.items()}


def moved(model: Tensors, step: Tensors) -> Tensors:
    """The model after a float64 step, each tensor in its own dtype again."""
    return {name: (p.to(torch.float64) + step[name]).to(p.dtype) for name, p in model.items()}
