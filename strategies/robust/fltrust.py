"""FLTrust (Cao et al. 2021, "FLTrust: Byzantine-Robust Federated Learning via Trust Bootstrapping").

g_0 is the delta of a client that the server's operator trusts, whose few clean examples the paper calls the
root dataset; g_i are the other clients' deltas. Each is weighted by its cosine with g_0, if positive, and
scaled to g_0's length:

    TS_i = max(0, <g_i, g_0> / (||g_i|| ||g_0||))
    g    = sum_i TS_i (||g_0|| / ||g_i||) g_i / sum_i TS_i

The model moves by alpha g, where alpha is `lr`. g_0 itself isn't in the mean. Where all weights are zero, or
the trusted client didn't move, the model stays as it is; the paper does not treat this case. Hostile clients,
however many, cannot move the model farther than the trusted one would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atoll.errors import InconsistentUpdates
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import clients_of
from atoll.protocol.tensors import Tensors
from atoll.strategies.robust.rows import moved_by, rows_of
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class FlTrust:
    """Move by `lr` times the mean of the deltas, weighted by their agreement with the client `root`'s."""

    root: str
    lr: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`.

        Raises:
            InconsistentUpdates: the trusted client's update is missing.
        """
        clients, rows = list(clients_of(updates)), rows_of(model, updates)
        if self.root not in clients:
            raise InconsistentUpdates(f"no update of {self.root}, which the others are compared with")
        root = rows[clients.index(self.root)].clone()
        rows[clients.index(self.root)] = 0  # a row of length 0 is trusted in nothing
        return moved_by(model, trusted_mean(rows, root), self.lr), state


def trusted_mean(rows: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The trust-weighted mean [numbers] of rows [clients, numbers] scaled to `root`'s length, in float64.

    >>> rows = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-9.0, 0.0]], dtype=torch.float64)
    >>> trusted_mean(rows, torch.tensor([3.0, 4.0], dtype=torch.float64)).round(decimals=3).tolist()
    [2.143, 2.857]
    """
    length, lengths = torch.linalg.vector_norm(root), torch.linalg.vector_norm(rows, dim=1)
    shares = torch.where(lengths > 0, 1 / lengths, 0.0)
    trust = (rows @ root).clamp_min(0) * shares  # TS_i ||g_0||
    total = trust.sum()
    return (trust * shares @ rows) * (length / total) if total > 0 else torch.zeros_like(root)
