"""FedAsync (Xie et al. 2019, "Asynchronous Federated Optimization", algorithm 1).

The server mixes every client's model into its own as soon as it arrives, with less weight the later it is:

    x_t = (1 - alpha_t) x_{t-1} + alpha_t x_new        alpha_t = alpha * s(t - tau)

alpha is `lr`; `late.py` has the weights s. A client's loss has a proximal term of strength `proximal_mu`, the
paper's rho, around the model x_tau from which it started. With x_new = x_tau + delta the step in delta is
alpha_t * (x_tau - x_{t-1} + delta): a late client also pulls back towards where it started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.asynchronous.late import WeighsLate
from atoll.strategies.fedavg import FedAvg
from atoll.strategies.mean import evenly
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class FedAsync(WeighsLate):
    """Move by `lr` times s(staleness) times the difference to the model of the one client."""

    lr: float = 0.6
    proximal_mu: float = 0.005

    @property
    def _step(self) -> FedAvg:
        return FedAvg(self.lr, proximal_mu=self.proximal_mu)

    def begin(self, model: Tensors) -> State:
        return self._step.begin(model)

    def plan(self, state: State, round: int) -> Plan:
        return self._step.plan(state, round)

    def late(self, delta: Tensors, drift: Mapping[str, torch.Tensor], staleness: int) -> Tensors:
        """s(staleness) times the client's model minus the present one."""
        weight = self.weight(staleness)
        return {name: (weight * (drift[name] + d.to(torch.float64))).to(d.dtype) for name, d in delta.items()}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        return self._step.merge(model, evenly(updates), state)
