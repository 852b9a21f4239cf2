"""Converts a round's updates to rows of numbers, and a row to a step of the model.

A row is one client's delta, its tensors concatenated in the order of their names. All rows have the same
weight: a hostile client could report any number of examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from atoll.errors import InconsistentUpdates
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import moved
from atoll.strategies.options import HostileClients, HostileOptions
from atoll.strategies.robust.nearest_neighbour_mixing import mixed


def rows_to_merge(model: Tensors, updates: Sequence[Update], options: HostileClients) -> torch.Tensor:
    """The deltas as rows [clients, numbers] in float64, mixed where the options ask for it.

    Raises:
        InconsistentUpdates: there are fewer updates than the rule needs against `options.hostile` clients.
    """
    if len(updates) < options.clients_needed:
        raise InconsistentUpdates(
            f"{len(updates)} updates to merge, expected at least {options.clients_needed}"
            f" ({options.formula}) against {options.hostile} hostile clients"
        )
    rows = rows_of(model, updates)
    mixes = isinstance(options, HostileOptions) and options.mixing
    return mixed(rows, options.hostile) if mixes else rows


def rows_of(model: Tensors, updates: Sequence[Update]) -> torch.Tensor:
    """The deltas as rows [clients, numbers] in float64."""
    rows = torch.empty(len(updates), sum(p.numel() for p in model.values()), dtype=torch.float64)
    for name, span in _spans(model):
        if isinstance(updates, StackedUpdates):
            rows[:, span] = updates.delta[name].reshape(len(updates), -1).to(torch.float64)
        else:
            for row, update in zip(rows, updates, strict=True):
                row[span] = update.delta[name].reshape(-1).to(torch.float64)
    return rows


def flat(model: Tensors) -> torch.Tensor:
    """The model's numbers [numbers] in the order of a row, in float64."""
    return torch.cat([model[name].reshape(-1).to(torch.float64) for name, _ in _spans(model)])


def moved_by(model: Tensors, row: torch.Tensor, lr: float) -> Tensors:
    """The model moved by `lr` times a row of numbers; each tensor keeps its dtype."""
    return moved(model, {name: (lr * row[span]).reshape(model[name].shape) for name, span in _spans(model)})


def _spans(model: Tensors) -> Iterator[tuple[str, slice]]:
    """(name, place in a row) of each tensor, by name: tensors of a checkpoint may come in another order."""
    start = 0
    for name in sorted(model):
        yield name, slice(start, start + model[name].numel())
        start += model[name].numel()
