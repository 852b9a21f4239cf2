"""FedBuff (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", algorithm 1).

The server gathers updates delta_i as they arrive, whatever model they started from, and moves when its buffer
holds K of them (`federation.cohort`), while as many clients as `federation.concurrency` are at work:

    w <- w + eta_g / K * sum_i s(tau_i) delta_i        s(tau) = 1 / sqrt(1 + tau)

tau_i is the staleness of an update, eta_g is `lr`. Clients have equal weights. The paper's experiments have a
server momentum, as in FedAvgM. Each s is at most 1, so it does not weaken the bound of one client's clipped
update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.asynchronous.late import WeighsLate, scaled
from atoll.strategies.fedavg import FedAvg
from atoll.strategies.mean import evenly
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class FedBuff(WeighsLate):
    """Move by `lr` times the mean of the buffer's deltas, each weighted by s, with `momentum`."""

    lr: float = 1.0
    momentum: float = 0.0

    @property
    def _step(self) -> FedAvg:
        return FedAvg(self.lr, self.momentum)

    def begin(self, model: Tensors) -> State:
        return self._step.begin(model)

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def late(self, delta: Tensors, drift: Mapping[str, torch.Tensor], staleness: int) -> Tensors:
        """s(tau) times the delta; the client's start has no influence."""
        return scaled(delta, self.weight(staleness))

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        return self._step.merge(model, evenly(updates), state)
