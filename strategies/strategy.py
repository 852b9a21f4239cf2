"""The seam of a strategy: pure functions on tensors, state in and state out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors

State = dict[str, torch.Tensor | float]
"""What must survive a round: flat, so that it can be saved, hashed and compared."""

Plan = Mapping[str, float]
"""What clients get besides the model."""


class Strategy(Protocol):
    """How one round's updates become the next global model."""

    def begin(self, model: Tensors) -> State:
        """The state before the first round."""
        ...

    def plan(self, state: State, round: int) -> Plan:
        """Numbers the clients need for this round."""
        ...

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """The next model and state; `updates` come in canonical order, by client name."""
        ...
