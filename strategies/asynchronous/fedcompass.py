"""FedCompass (Li et al. 2024, "FedCompass: Efficient Cross-Silo Federated Learning on Heterogeneous Client
Devices Using a Computing Power-Aware Scheduler").

The server gives each client as many local steps as let a group of clients be done together, and merges the
deltas of a group, or of a client that is late, when they are there:

    w <- w + eta_g sum_i p_i s(tau_i) delta_i

tau_i is the staleness of an update, eta_g is `lr`. The weights p_i are even: 1 over the number of clients
that are at work at a time (`federation.concurrency`), so that a merge of all of them is their mean. `late.py`
has the weights s, and `server/rounds/asynchronous/arrival_groups.py` how steps and groups are found.

The authors keep a late update for the next group's merge. Here it is merged as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.asynchronous.late import WeighsLate, scaled
from atoll.strategies.mean import moved, weighted_sum
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True, kw_only=True)
class FedCompass(WeighsLate):
    """Move by `lr` / `at_work` times the sum of the deltas, each weighted by s."""

    at_work: int
    lr: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def late(self, delta: Tensors, drift: Mapping[str, torch.Tensor], staleness: int) -> Tensors:
        """s(tau) times the delta; the client's start has no influence."""
        return scaled(delta, self.weight(staleness))

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        weights = torch.full((len(updates),), self.lr / self.at_work, dtype=torch.float64)
        return moved(model, weighted_sum(updates, weights)), state
