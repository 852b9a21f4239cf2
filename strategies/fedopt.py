"""FedAdagrad, FedAdam and FedYogi: adaptive server steps on the mean delta.

Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2, with d the mean delta:
m <- beta1 m + (1 - beta1) d;  v <- rule(v, d);  x <- x + lr m / (sqrt(v) + tau).
As in the paper there is no bias correction (torch's Adam has one), Adagrad sums squares
without decay, and v starts at tau^2, the smallest start the paper allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import moved, weighted_mean
from atoll.strategies.strategy import Plan, State

SecondMoment = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(second moment v, mean delta d, beta2) to the next v."""


def adagrad(v: torch.Tensor, d: torch.Tensor, beta2: float) -> torch.Tensor:
    """v + d^2, the sum of squares without decay; `beta2` is not used."""
    return v + d * d


def adam(v: torch.Tensor, d: torch.Tensor, beta2: float) -> torch.Tensor:
    """beta2 v + (1 - beta2) d^2, an exponential mean of squares."""
    return beta2 * v + (1 - beta2) * d * d


def yogi(v: torch.Tensor, d: torch.Tensor, beta2: float) -> torch.Tensor:
    """v - (1 - beta2) d^2 sign(v - d^2), which moves by at most (1 - beta2) d^2 a round."""
    return v - (1 - beta2) * d * d * torch.sign(v - d * d)


STEPS: dict[str, SecondMoment] = {"adagrad": adagrad, "adam": adam, "yogi": yogi}


@dataclass(frozen=True)
class FedOpt:
    """Move by `lr` m / (sqrt(v) + `tau`); `tau` keeps the step finite where nothing has moved yet."""

    second_moment: SecondMoment
    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def begin(self, model: Tensors) -> State:
        state: State = {}
        for name, p in model.items():
            state[f"m.{name}"] = torch.zeros_like(p, dtype=torch.float64)
            state[f"v.{name}"] = torch.full_like(p, self.tau**2, dtype=torch.float64)
        return state

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        step: Tensors = {}
        after: State = {}
        for name, d in weighted_mean(updates).items():
            m = self.beta1 * cast(torch.Tensor, state[f"m.{name}"]) + (1 - self.beta1) * d
            v = self.second_moment(cast(torch.Tensor, state[f"v.{name}"]), d, self.beta2)
            step[name] = self.lr * m / (torch.sqrt(v) + self.tau)
            after[f"m.{name}"], after[f"v.{name}"] = m, v
        return moved(model, step), after
