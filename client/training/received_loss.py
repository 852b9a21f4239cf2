"""What clients tell fair strategies of the model as it came: its loss on their training examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from atoll.protocol.messages import RECEIVED_LOSS, Update
from atoll.protocol.stacked_updates import StackedUpdates


def with_received_losses(updates: Iterable[Update], losses: Mapping[str, float]) -> Iterable[Update]:
    """The updates with each client's loss among the states; a cohort's stay stacked.

    Of a client without examples nothing is said, and its update counts in no merge.

    >>> told = {"train_loss.count": torch.ones(())}
    >>> [update] = with_received_losses([Update("a", 1, {}, 1, told)], {"a": 0.5})
    >>> sorted(update.states)
    ['received_loss', 'train_loss.count']
    """
    if isinstance(updates, StackedUpdates):
        told = torch.tensor([losses[client] for client in updates.clients], dtype=torch.float64)
        return replace(updates, states={**updates.states, RECEIVED_LOSS: told})
    return _each_with_its_loss(updates, losses)


def _each_with_its_loss(updates: Iterable[Update], losses: Mapping[str, float]) -> Iterator[Update]:
    for update in updates:
        loss = losses.get(update.client)
        told = {} if loss is None else {RECEIVED_LOSS: torch.tensor(loss, dtype=torch.float64)}
        yield replace(update, states={**update.states, **told})
