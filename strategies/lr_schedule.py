"""A schedule of the server's learning rate over the rounds, for any strategy with an `lr`.

`atoll.job.train.lr_factor` has the formulas. Only the step is scaled: momentum accumulates unscaled deltas,
as in torch's SGD.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from atoll.job.job import StrategySection
from atoll.job.train import lr_factor
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors
from atoll.strategies.asynchronous.late import MergesLate
from atoll.strategies.strategy import Plan, State, Strategy, tensors_for_clients


@dataclass(frozen=True)
class LrSchedule:
    """The factor of the learning rate in each round of a run."""

    section: StrategySection
    rounds: int

    def factor(self, round: int) -> float:
        """The factor of a round, which counts from 1."""
        return lr_factor(self.section, round, self.rounds)


@dataclass(frozen=True)
class Scheduled:
    """A strategy, a dataclass with an `lr`, whose learning rate follows a schedule."""

    inner: Strategy
    schedule: LrSchedule

    def begin(self, model: Tensors) -> State:
        return self.inner.begin(model)

    def plan(self, state: State, round: int) -> Plan:
        return self.inner.plan(state, round)

    def tensors_for_clients(self, state: State) -> Tensors:
        """The tensors that the inner strategy sends."""
        return tensors_for_clients(self.inner, state)

    def late(self, delta: Tensors, drift: Mapping[str, torch.Tensor], staleness: int) -> Tensors:
        """A late update as the inner strategy weights it."""
        return cast(MergesLate, self.inner).late(delta, drift, staleness)

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        round = updates.round if isinstance(updates, StackedUpdates) else updates[0].round
        inner = cast(Any, self.inner)
        strategy: Strategy = replace(inner, lr=inner.lr * self.schedule.factor(round))
        return strategy.merge(model, updates, state)
