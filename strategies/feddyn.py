"""FedDyn (Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", algorithm 1).

theta is the model, L_k client k's loss, m the number of all clients and P those of a round. A client that
holds the gradient g_k of its loss where its last round ended (zero at first) minimises, from theta,

    L_k(w) - <g_k, w> + alpha / 2 ||w - theta||^2

by its local steps, which end at theta_k, and keeps g_k <- g_k - alpha (theta_k - theta). The paper's server
holds h, zero at first: h <- h - alpha / m sum over P of (theta_k - theta), and then
theta <- mean over P of theta_k - h / alpha. Means are unweighted, whatever the shards' sizes. If local steps
reach the minimum and the models converge, the limit is a stationary point of the mean loss. The client's part
is in `client/state/feddyn.py`; it keeps its g_k, however long ago it took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import even_mean, moved
from atoll.strategies.strategy import Plan, State

PREFIX = "h."
"""The prefix of h's names in the strategy's state."""


@dataclass(frozen=True)
class FedDyn:
    """Move to the unweighted mean of the clients' models minus h / `alpha`; `clients` is the paper's m."""

    clients: int
    alpha: float = 0.01

    def begin(self, model: Tensors) -> State:
        return {PREFIX + name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.items()}

    def plan(self, state: State, round: int) -> Plan:
        return {"proximal_mu": self.alpha}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        step: Tensors = {}
        after: State = {}
        for name, d in even_mean(updates).items():
            h = cast(torch.Tensor, state[PREFIX + name]) - self.alpha * len(updates) / self.clients * d
            step[name], after[PREFIX + name] = d - h / self.alpha, h
        return moved(model, step), after
