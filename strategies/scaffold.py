"""SCAFFOLD (Karimireddy et al. 2020, "Stochastic Controlled Averaging", algorithm 1): the server's part.

x is the model, c the server's control variate and c_i that of client i, all zero at first; N is the number
of all clients and S those of a round. A client starts at y_i = x, takes K local steps
y_i <- y_i - eta_l (g_i(y_i) - c_i + c), which hold back its drift, and renews its own:

    option I:  c_i+ = the gradient of its loss at x, by one more pass over its examples
    option II: c_i+ = c_i - c + (x - y_i) / (K eta_l)

It sends y_i - x and c_i+ - c_i. The server moves both by unweighted means, whatever the shards' sizes, as the
paper does: x <- x + eta_g mean over S of (y_i - x), and c <- c + |S| / N mean over S of (c_i+ - c_i), so that
c stays the mean of all c_i. eta_g is `lr`. The client's part is in `client/state/scaffold.py`; it keeps its
c_i, however long ago it took part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.errors import InconsistentUpdates
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import stacked_strategy_tensors
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import even_mean, moved
from atoll.strategies.strategy import Plan, State

PREFIX = "c."
"""The prefix of the server's control variate in the strategy's state."""


@dataclass(frozen=True)
class Scaffold:
    """Move by `lr` times the unweighted mean delta, and c by its clients' changes; N is `clients`."""

    clients: int
    lr: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {PREFIX + name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.items()}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def tensors_for_clients(self, state: State) -> Tensors:
        """The control variate c, named as the model's tensors, in float32."""
        return {
            name.removeprefix(PREFIX): cast(torch.Tensor, value).to(torch.float32)
            for name, value in state.items()
            if name.startswith(PREFIX)
        }

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`.

        Raises:
            InconsistentUpdates: an update lacks the change of its client's control variate.
        """
        moves = stacked_strategy_tensors(updates)
        if moves.keys() != model.keys():
            raise InconsistentUpdates("updates without control variates, expected one from every client")
        step = {name: self.lr * d for name, d in even_mean(updates).items()}
        after = {
            PREFIX + name: cast(torch.Tensor, state[PREFIX + name])
            + move.to(torch.float64).sum(0) / self.clients
            for name, move in moves.items()
        }
        return moved(model, step), cast(State, after)
