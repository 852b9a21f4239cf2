"""The server's learning rate over the rounds: any strategy with an `lr`, whose steps grow and shrink.

With T rounds of which W warm up, round t (from 1) takes `lr` times

    t / W                                           while t <= W: linear warm-up
    1                                               constant
    (1 + cos(pi (t - W - 1) / (T - W))) / 2         cosine (Loshchilov and Hutter 2017, without restarts)
    decay ^ floor((t - W - 1) / step)               step: times `decay` after every `step` rounds

so that the first round after the warm-up takes the whole `lr`, as with torch's CosineAnnealingLR and StepLR.
Only the step is scaled: a momentum is that of unscaled deltas, as torch's SGD has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from atoll.job.job import StrategySection
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors
from atoll.strategies.strategy import Plan, State, Strategy, tensors_for_clients


@dataclass(frozen=True)
class LrSchedule:
    """What part of the learning rate each of so many rounds takes."""

    section: StrategySection
    rounds: int

    def factor(self, round: int) -> float:
        """Of this round, which counts from 1."""
        warmup, section = self.section.lr_warmup or 0, self.section
        if round <= warmup:
            return round / warmup
        past = round - warmup - 1
        match section.lr_schedule:
            case "cosine":
                return (1 + math.cos(math.pi * past / max(1, self.rounds - warmup))) / 2
            case "step":
                assert section.lr_step is not None, "the job's rules ask for it"
                return float((section.lr_decay or 0.1) ** (past // section.lr_step))
        return 1.0


@dataclass(frozen=True)
class Scheduled:
    """A strategy that is a dataclass with an `lr`, which follows the schedule."""

    inner: Strategy
    schedule: LrSchedule

    def begin(self, model: Tensors) -> State:
        return self.inner.begin(model)

    def plan(self, state: State, round: int) -> Plan:
        return self.inner.plan(state, round)

    def tensors_for_clients(self, state: State) -> Tensors:
        """What the inner strategy sends."""
        return tensors_for_clients(self.inner, state)

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        round = updates.round if isinstance(updates, StackedUpdates) else updates[0].round
        inner = cast(Any, self.inner)
        strategy: Strategy = replace(inner, lr=inner.lr * self.schedule.factor(round))
        return strategy.merge(model, updates, state)
