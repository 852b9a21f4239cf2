"""q-FedAvg (Li et al. 2020, "Fair Resource Allocation in Federated Learning", algorithm 2), for q-FFL's aim.

q-FFL minimises the sum over clients k of p_k F_k(w)^(q + 1) / (q + 1): with q = 0 it is the mean loss, and
the larger q is, the more a client with a large loss F_k counts. Every client k of a round's S trains from w
to w_k and sends F_k(w), the loss of the model that it received on its training examples. With L, an estimate
of the Lipschitz constant of the gradients for q = 0, which is 1 over the clients' learning rate,

    Delta w_k = L (w - w_k)             Delta_k = F_k^q Delta w_k
    h_k = q F_k^(q - 1) ||Delta w_k||^2 + L F_k^q
    w <- w - sum over S of Delta_k / sum over S of h_k

so that no learning rate has to be tuned for each q. The paper draws client k with probability p_k and sums
without weights; here S is drawn uniformly, so p_k is the same for all clients, whatever their numbers of
examples. Both sums are divided by max_k F_k^q, which leaves their quotient unchanged and avoids overflow.
Losses below 1e-10 count as 1e-10, since F_k^(q - 1) has no value at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atoll.errors import InconsistentUpdates
from atoll.protocol.messages import RECEIVED_LOSS, Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import delta_of, moved, sent_numbers, squared_norm, weighted_sum
from atoll.strategies.strategy import Plan, State

LEAST_LOSS = 1e-10


@dataclass(frozen=True)
class QFedAvg:
    """Move by deltas weighted by a power of each client's loss; `lipschitz` is the paper's L."""

    lipschitz: float
    q: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`.

        Raises:
            InconsistentUpdates: an update lacks the loss of the received model, or has one below 0.
        """
        sent = sent_numbers(updates, RECEIVED_LOSS)
        client = min(sent, key=sent.__getitem__)
        if sent[client] < 0:
            raise InconsistentUpdates(
                f"{client} sent a loss of {sent[client]:g}, expected at least 0: qffl takes powers of it"
            )
        losses = torch.tensor([*sent.values()], dtype=torch.float64).clamp_min(LEAST_LOSS)
        most = losses.max()
        share = losses / most
        squares = torch.tensor(
            [squared_norm(delta_of(updates, i)) for i in range(len(updates))], dtype=torch.float64
        )
        powers, slopes = share**self.q, self.q * share ** (self.q - 1) / most
        h = slopes * self.lipschitz**2 * squares + self.lipschitz * powers
        weights = self.lipschitz * powers / h.sum()
        return moved(model, weighted_sum(updates, weights)), state
