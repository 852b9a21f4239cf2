"""Reptile (Nichol et al. 2018, "On First-Order Meta-Learning Algorithms", section 5, a batch of tasks).

The model moves by `lr` (the paper's epsilon) times the unweighted mean of the clients' deltas: every client
is a task and has the same weight, whatever the size of its shard. With several local steps per round the
result is an initialisation that a few more steps adapt to a client; `evaluate.adapt` measures that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import even_mean, moved
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class Reptile:
    """Move by `lr` times the unweighted mean of the deltas."""

    lr: float = 0.5

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        return moved(model, {name: self.lr * d for name, d in even_mean(updates).items()}), state
