"""Early stopping (Prechelt 1998): the best model by what clients measure on data they kept back.

The metric is the task's headline, added up over the clients' validation splits: never the test set, which
would no longer be one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from atoll.protocol.tensors import Tensors
from atoll.report.comparison import lower_is_better
from atoll.report.run_result import RoundExtras
from atoll.strategies.strategy import State
from atoll.tasks.metric_values import MetricValues

PREFIX = "stopping."
"""Before the names of what a checkpoint keeps of it."""

BEST = PREFIX + "best."
"""Before the names of the best model's tensors."""


Measure = Callable[[], MetricValues]
"""Has the clients measure the model: metrics over all of their validation splits."""


class StoppingRule(Protocol):
    """What ends training by measurements, and remembers the best model."""

    @property
    def best(self) -> Tensors:
        """The best model so far; empty where none was looked for."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether training should end."""
        ...

    @property
    def description(self) -> str:
        """What came of it, in one line."""
        ...

    def observe(self, round: int, model: Tensors, measure: Measure) -> RoundExtras:
        """Take note of the model of a round; what its line in the log says of that."""
        ...

    def state(self) -> State:
        """What a checkpoint keeps."""
        ...

    def resume(self, state: State) -> State:
        """Take back what `state` said; what is left is the strategy's."""
        ...


@dataclass(frozen=True)
class NoEarlyStopping:
    """Training lasts for all rounds, and the last model is the one that counts."""

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
    """How long nothing was better than the best, and the model that was best."""

    metric: str
    patience: int
    round: int = 0
    value: float = math.nan
    rounds_without_improvement: int = 0
    best: Tensors = field(default_factory=dict)

    def observe(self, round: int, model: Tensors, measure: Measure) -> RoundExtras:
        """Have the clients measure the model, and take note of it; for the log, what they measured."""
        validation = measure()
        self.update(round, validation.get(self.metric), model)
        return {"validation": validation}

    def update(self, round: int, value: float | None, model: Tensors) -> None:
        """Take note of a measurement; an undefined value (None) is none, and patience doesn't count it."""
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
        """Whether as many measurements as the patience lasts have passed without a better one."""
        return self.rounds_without_improvement >= self.patience

    @property
    def description(self) -> str:
        """What came of it, in one line."""
        if not self.best:
            return f"the model is the last round's: at no time was the clients' {self.metric} defined"
        found = (
            f"the model is round {self.round}'s, the best by the clients' {self.metric} ({self.value:.4g})"
        )
        return found + (
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
