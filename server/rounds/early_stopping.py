"""Early stopping (Prechelt 1998): the best model by a metric on the clients' validation splits.

The metric is the task's primary one, over all clients' validation splits. The test set is never used: a model
chosen by it could no longer be tested on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from atoll.protocol.tensors import Tensors
from atoll.report.run_result import RoundExtras
from atoll.strategies.strategy import State
from atoll.tasks.metric_values import MetricValues, lower_is_better

PREFIX = "stopping."
"""The prefix of early stopping's entries in a checkpoint."""

BEST = PREFIX + "best."
"""The prefix of the best model's tensors in a checkpoint."""


Measure = Callable[[], MetricValues]
"""A function that lets clients evaluate the model; it returns metrics over all their validation splits."""


class StoppingRule(Protocol):
    """Decides by measurements when training ends, and remembers the best model."""

    @property
    def best(self) -> Tensors:
        """The tensors of the best model so far; empty without early stopping."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether training should end."""
        ...

    @property
    def description(self) -> str:
        """How training ended, in one line for the result."""
        ...

    def observe(self, round: int, model: Tensors, measure: Measure) -> RoundExtras:
        """Take a round's model into account; returns the entries for the round's log line."""
        ...

    def state(self) -> State:
        """The entries for a checkpoint."""
        ...

    def resume(self, state: State) -> State:
        """Restore what `state` returned from a checkpoint's entries; returns the other entries."""
        ...


@dataclass(frozen=True)
class NoEarlyStopping:
    """No early stopping: training lasts for all rounds, and the last model is used."""

    best: Tensors = field(default_factory=dict)
    is_over: bool = False
    description: str = ""

    def observe(self, round: int, model: Tensors, measure: Measure) -> RoundExtras:
        return {}

    def state(self) -> State:
        return {}

    def resume(self, state: State) -> State:
        return state


@dataclass
class EarlyStopping:
    """Ends training after `patience` measurements without a better one, and keeps the best model."""

    metric: str
    patience: int
    round: int = 0
    value: float = math.nan
    rounds_without_improvement: int = 0
    best: Tensors = field(default_factory=dict)

    def observe(self, round: int, model: Tensors, measure: Measure) -> RoundExtras:
        """Let the clients evaluate the model, and take the value into account; returns their metrics."""
        validation = measure()
        self.update(round, validation.get(self.metric), model)
        return {"validation": validation}

    def update(self, round: int, value: float | None, model: Tensors) -> None:
        """Take a measurement into account; an undefined value (None) is ignored."""
        if value is None:
            return
        gain = self.value - value if lower_is_better(self.metric) else value - self.value
        if gain > 0 or not self.best:
            self.round, self.value, self.rounds_without_improvement = round, value, 0
            # A checkpoint holds it beside the present model, in which no two tensors may be one.
            self.best = {name: tensor.clone() for name, tensor in model.items()}
        else:
            self.rounds_without_improvement += 1

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` measurements brought no better value."""
        return self.rounds_without_improvement >= self.patience

    @property
    def description(self) -> str:
        """What came of it, in one line."""
        if not self.best:
            return f"the model is the last round's: at no time was the clients' {self.metric} defined"
        description = (
            f"the model is round {self.round}'s, the best by the clients' {self.metric} ({self.value:.4g})"
        )
        return description + (
            f"; {self.rounds_without_improvement} measurements since then were not better"
            if self.is_over
            else ""
        )

    def state(self) -> State:
        """What a checkpoint keeps, as a strategy's state."""
        numbers = {
            "round": float(self.round),
            "value": self.value,
            "waited": float(self.rounds_without_improvement),
        }
        return {PREFIX + k: v for k, v in numbers.items()} | {BEST + n: t for n, t in self.best.items()}

    def resume(self, state: State) -> State:
        """Take back what `state` said; what is left is the strategy's."""
        if PREFIX + "round" in state:
            self.round, self.rounds_without_improvement = (
                int(state[PREFIX + "round"]),
                int(state[PREFIX + "waited"]),
            )
            self.value = float(state[PREFIX + "value"])
        self.best = {
            n.removeprefix(BEST): t
            for n, t in state.items()
            if n.startswith(BEST) and isinstance(t, torch.Tensor)
        }
        return {n: v for n, v in state.items() if not n.startswith(PREFIX)}
