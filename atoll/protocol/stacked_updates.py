"""The updates of a whole cohort as stacked tensors, with one slice per client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class StackedUpdates(Sequence[Update]):
    """A sequence of updates whose tensors are stacked: `delta[name]` is [clients, …]."""

    clients: tuple[str, ...]
    round: int
    delta: Tensors
    num_examples: tuple[int, ...]
    states: Tensors = field(default_factory=dict)
    strategy_tensors: Tensors = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients)

    @overload
    def __getitem__(self, place: int) -> Update: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Update]: ...
    def __getitem__(self, place: int | slice) -> Update | Sequence[Update]:
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        return Update(
            client=self.clients[place],
            round=self.round,
            delta={name: t[place].clone() for name, t in self.delta.items()},
            num_examples=self.num_examples[place],
            states={name: t[place].clone() for name, t in self.states.items()},
            strategy_tensors={name: t[place].clone() for name, t in self.strategy_tensors.items()},
        )

    def of_clients(self, clients: Sequence[str]) -> StackedUpdates:
        """The same updates in the order of `clients`, which must all be among them."""
        place = {client: i for i, client in enumerate(self.clients)}
        return self.take([place[client] for client in clients])

    def take(self, places: Sequence[int]) -> StackedUpdates:
        """The updates at these places, in that order."""
        if list(places) == list(range(len(self))):
            return self
        index = torch.tensor(list(places), dtype=torch.int64)
        return StackedUpdates(
            clients=tuple(self.clients[p] for p in places),
            round=self.round,
            delta={name: t.index_select(0, index) for name, t in self.delta.items()},
            num_examples=tuple(self.num_examples[p] for p in places),
            states={name: t.index_select(0, index) for name, t in self.states.items()},
            strategy_tensors={n: t.index_select(0, index) for n, t in self.strategy_tensors.items()},
        )


def stacked(updates: Sequence[Update]) -> StackedUpdates:
    """The same updates as stacked tensors; they must agree in names, shapes and dtypes."""
    if isinstance(updates, StackedUpdates):
        return updates
    return StackedUpdates(
        clients=tuple(u.client for u in updates),
        round=updates[0].round,
        delta={name: torch.stack([u.delta[name] for u in updates]) for name in updates[0].delta},
        num_examples=tuple(u.num_examples for u in updates),
        states=stacked_states(updates),
        strategy_tensors=stacked_strategy_tensors(updates),
    )


def stacked_states(updates: Sequence[Update]) -> Tensors:
    """The updates' states, stacked to [clients, …]; deltas, which may be large, are not stacked."""
    if isinstance(updates, StackedUpdates):
        return updates.states
    return {name: torch.stack([u.states[name] for u in updates]) for name in updates[0].states}


def clients_of(updates: Sequence[Update]) -> Sequence[str]:
    """The clients of the updates, in order; stacked updates are not taken apart for it."""
    if isinstance(updates, StackedUpdates):
        return updates.clients
    return [update.client for update in updates]


def taken(updates: Sequence[Update], places: Sequence[int]) -> Sequence[Update]:
    """The updates at these places, in that order; stacked updates stay stacked."""
    if isinstance(updates, StackedUpdates):
        return updates.take(places)
    return [updates[place] for place in places]


def weighing(updates: Sequence[Update], weights: Sequence[int]) -> Sequence[Update]:
    """The updates with `weights` as their `num_examples`; stacked updates stay stacked."""
    if isinstance(updates, StackedUpdates):
        return replace(updates, num_examples=tuple(weights))
    pairs = zip(updates, weights, strict=True)
    return [replace(update, num_examples=weight) for update, weight in pairs]


def with_state(
    updates: Iterable[Update], name: str, value_of: Callable[[str, int], float | None]
) -> Iterable[Update]:
    """The updates with one more number, `name`, among the states of each; stacked updates stay stacked.

    `value_of` maps (client, number of examples) to the number, or to None, for which nothing is added.
    """
    if isinstance(updates, StackedUpdates):
        values = [value_of(*one) for one in zip(updates.clients, updates.num_examples, strict=True)]
        return replace(updates, states={**updates.states, name: torch.tensor(values, dtype=torch.float64)})
    return (_with_number(update, name, value_of(update.client, update.num_examples)) for update in updates)


def _with_number(update: Update, name: str, value: float | None) -> Update:
    if value is None:
        return update
    return replace(update, states={**update.states, name: torch.tensor(value, dtype=torch.float64)})


def stacked_strategy_tensors(updates: Sequence[Update]) -> Tensors:
    """The updates' `strategy_tensors`, stacked to [clients, …]."""
    if isinstance(updates, StackedUpdates):
        return updates.strategy_tensors
    names = updates[0].strategy_tensors
    return {name: torch.stack([u.strategy_tensors[name] for u in updates]) for name in names}


def joined(parts: Sequence[StackedUpdates]) -> StackedUpdates:
    """Several stacks of one round's updates, concatenated."""
    if len(parts) == 1:
        return parts[0]
    return StackedUpdates(
        clients=tuple(client for part in parts for client in part.clients),
        round=parts[0].round,
        delta={name: torch.cat([part.delta[name] for part in parts]) for name in parts[0].delta},
        num_examples=tuple(n for part in parts for n in part.num_examples),
        states={name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states},
        strategy_tensors={
            name: torch.cat([part.strategy_tensors[name] for part in parts])
            for name in parts[0].strategy_tensors
        },
    )
