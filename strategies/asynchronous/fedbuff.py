"""FedBuff (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", algorithm 1).

The server gathers updates delta_i as they arrive, whatever model they started from, and moves when its buffer
holds K of them (`federation.cohort`), while as many clients as `federation.concurrency` are at work:

    w <- w + eta_g / K * sum_i s(tau_i) delta_i        s(tau) = 1 / sqrt(1 + tau)

tau_i is the staleness of an update, eta_g is `lr`. Clients weigh the same. The paper's experiments have a
server momentum, as FedAvgM's. Each s is at most 1, so that what is clipped after it keeps one client's bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.asynchronous.late import Weighing, staleness_weight
from atoll.strategies.mean import even_mean, moved
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class FedBuff:
    """Move by `lr` times the even mean of the buffer's weighed deltas, with momentum if any."""

    lr: float = 1.0
    momentum: float = 0.0
    weighing: Weighing = "polynomial"
    a: float = 0.5
    b: float = 4.0

    def begin(self, model: Tensors) -> State:
        if self.momentum == 0:
            return {}
        return {f"momentum.{name}": torch.zeros_like(p, dtype=torch.float64) for name, p in model.items()}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def late(self, delta: Tensors, drift: Tensors, staleness: int) -> Tensors:
        """s(tau) delta, wherever the client started."""
        weight = staleness_weight(self.weighing, staleness, self.a, self.b)
        return {name: (weight * d.to(torch.float64)).to(d.dtype) for name, d in delta.items()}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        mean = even_mean(updates)
        if self.momentum == 0:
            return moved(model, {name: self.lr * d for name, d in mean.items()}), state
        velocity = {
            name: self.momentum * cast(torch.Tensor, state[f"momentum.{name}"]) + d
            for name, d in mean.items()
        }
        step = {name: self.lr * v for name, v in velocity.items()}
        return moved(model, step), {f"momentum.{name}": v for name, v in velocity.items()}
