"""The seam of a strategy: pure functions on tensors, state in and state out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors

State = dict[str, torch.Tensor | float]
"""What must survive a round: flat, so that it can be saved, hashed and compared."""

Plan = Mapping[str, float]
"""What clients get besides the model."""


class Strategy(Protocol):
    """How one round's updates become the next global model: three pure functions.

    `begin` is called once, before the first round; then, in every round, `plan` before clients train and
    `merge` after. Nothing may be kept in the object: the state is what survives a crash.

    >>> import torch
    >>> from atoll.protocol.messages import Update
    >>> class Halfway:
    ...     def begin(self, model):
    ...         return {}
    ...     def plan(self, state, round):
    ...         return {}
    ...     def merge(self, model, updates, state):
    ...         mean = {n: sum(u.delta[n] for u in updates) / len(updates) for n in model}
    ...         return {n: model[n] + mean[n] / 2 for n in model}, state
    >>> updates = [Update(name, 1, {"w": torch.tensor([4.0])}, 10) for name in ("a", "b")]
    >>> Halfway().merge({"w": torch.tensor([1.0])}, updates, {})
    ({'w': tensor([3.])}, {})
    """

    def begin(self, model: Tensors) -> State:
        """The state before the first round; `model` has the trainable tensors by name."""
        ...

    def plan(self, state: State, round: int) -> Plan:
        """Numbers that the clients need in this round, which counts from 1, such as `proximal_mu`."""
        ...

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """The next model and state.

        Each update's `delta` has the shapes of `model`, is finite, and was made by `num_examples`
        examples; updates come in the order of their clients' names, and there is at least one. The model
        that comes back has the names and shapes of the one that was given; neither it nor the updates may
        be changed in place.
        """
        ...


@runtime_checkable
class SendsTensors(Protocol):
    """A strategy that sends tensors of its own beside the model.

    Each update answers with tensors of the same names, shapes and dtypes, as `strategy_tensors`.
    """

    def tensors_for_clients(self, state: State) -> Tensors:
        """What every client of the next round gets."""
        ...


def tensors_for_clients(strategy: Strategy, state: State) -> Tensors:
    """What the strategy sends beside the model; most send nothing."""
    return strategy.tensors_for_clients(state) if isinstance(strategy, SendsTensors) else {}
