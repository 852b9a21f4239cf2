"""FedAvg (McMahan et al. 2017), FedAvgM (Hsu et al. 2019) and FedProx (Li et al. 2020).

All three move the global model by the mean delta times a server learning rate. FedAvgM keeps
a momentum of it: v <- momentum * v + mean, x <- x + lr * v. FedProx changes only what clients
minimise: it adds mu / 2 * ||w - w_global||^2 to their loss, and mu is sent in the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import moved, moved_by_mean, weighted_mean
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class FedAvg:
    """Move by `lr` times the mean delta, with `momentum`; clients add the proximal term of `proximal_mu`."""

    lr: float = 1.0
    momentum: float = 0.0
    proximal_mu: float = 0.0

    def begin(self, model: Tensors) -> State:
        if self.momentum == 0:
            return {}
        return {f"momentum.{name}": torch.zeros_like(p, dtype=torch.float64) for name, p in model.items()}

    def plan(self, state: State, round: int) -> Plan:
        return {"proximal_mu": self.proximal_mu} if self.proximal_mu else {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        if self.momentum == 0:
            return moved_by_mean(model, updates, self.lr), state
        velocity = {
            name: self.momentum * cast(torch.Tensor, state[f"momentum.{name}"]) + d
            for name, d in weighted_mean(updates).items()
        }
        step = {name: self.lr * v for name, v in velocity.items()}
        return moved(model, step), {f"momentum.{name}": v for name, v in velocity.items()}
