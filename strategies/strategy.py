"""The seam of a strategy: pure functions on tensors, state in and state out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors

State = dict[str, torch.Tensor | float]
"""What a strategy remembers between rounds: tensors and numbers by name, saved with every checkpoint."""

Plan = Mapping[str, float]
"""Numbers that clients get with the model, by name, such as `{"proximal_mu": 0.01}`."""


class Strategy(Protocol):
    """How one round's updates become the next global model: three pure functions.

    `begin` is called once, before the first round; then, in every round, `plan` before clients train and
    `merge` after. Nothing may be remembered in the object: only the state survives a crash.

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
        """The state before the first round.

        `model` holds the trainable tensors by name, with the values that clients get in round 1.
        """
        ...

    def plan(self, state: State, round: int) -> Plan:
        """Numbers for the clients of this round, by name; empty where they need none.

        `round` counts from 1. Clients know `proximal_mu`: a client then adds mu / 2 * ||w - w_global||^2 to
        its loss (FedProx, Li et al. 2020).
        """
        ...

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """(the next model, the next state).

        `model` is what the clients started from. `updates` holds at least one update, in the order of the
        clients' names: `delta` has the names, shapes and dtypes of `model` and finite values, which are a
        client's tensors after training minus `model`; `num_examples` is how many examples it trained on.
        The next model has the names, shapes and dtypes of `model`. Change no argument in place.

        Raises:
            JobError: these updates cannot be merged; the run ends with that line.
        """
        ...


@runtime_checkable
class SendsTensors(Protocol):
    """A strategy that sends the clients further tensors beside the model, such as SCAFFOLD's control variate.

    Each client answers with tensors of the same names, shapes and dtypes: its update's `strategy_tensors`.
    """

    def tensors_for_clients(self, state: State) -> Tensors:
        """The tensors that every client of the next round gets, by name; `state` is that before the round."""
        ...


def tensors_for_clients(strategy: Strategy, state: State) -> Tensors:
    """The tensors that a strategy sends beside the model, by name; empty for most strategies."""
    return strategy.tensors_for_clients(state) if isinstance(strategy, SendsTensors) else {}
