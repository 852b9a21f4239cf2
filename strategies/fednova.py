"""FedNova (Wang et al. 2020, "Tackling the Objective Inconsistency Problem"): normalised averaging.

A client with more examples takes more local steps a round, and in the plain mean its delta d_i counts twice:
by its examples and by its steps. Here d_i is divided by ||a_i||_1, the sum of the weights with which its
local gradients make it up: its tau_i steps under plain SGD, and with momentum rho the sum over k = 1 ..
tau_i of (1 - rho^k) / (1 - rho). Each client sends that number; Adam's steps count as plain ones. With p_i
the client's share of the examples and tau_eff = sum_i p_i ||a_i||_1, the model moves by `lr` * tau_eff *
sum_i p_i d_i / ||a_i||_1. Where all take as many steps, this is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from atoll.protocol.messages import LOCAL_STEPS, Update
from atoll.protocol.stacked_updates import stacked
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import example_counts, moved, sent_numbers, weighted_mean
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class FedNova:
    """Move by `lr` times the mean delta of one local step, times the mean number of steps."""

    lr: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {LOCAL_STEPS: 1.0}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`.

        Raises:
            InconsistentUpdates: an update lacks the weight of its local steps.
        """
        steps = torch.tensor([*sent_numbers(updates, LOCAL_STEPS).values()], dtype=torch.float64)
        counts = torch.tensor(example_counts(updates), dtype=torch.float64)
        effective = float(counts @ steps / counts.sum())
        scale = effective / steps
        whole = stacked(updates)
        each = replace(whole, delta={n: _scaled(d, scale) for n, d in whole.delta.items()})
        return moved(model, {name: self.lr * d for name, d in weighted_mean(each).items()}), state


def _scaled(stack: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The stack [clients, …] times `scale` [clients], slice by slice, in float64."""
    return stack.to(torch.float64) * scale.reshape(-1, *[1] * (stack.dim() - 1))
