"""Centered clipping (Karimireddy et al. 2021, "Learning from History for Byzantine Robust Optimization").

From v, the merged delta of the round before (zero in the first one), each of L `iterations` takes v <- v + 1
/ n sum_i (x_i - v) min(1, tau / ||x_i - v||), tau being `clipping_norm`. No client moves v by more than tau
/ n in one of them, and what clients agree on is found over rounds. The paper's clients send their momentum;
here they send deltas, which several local steps have averaged as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.options import CenteredClippingOptions
from atoll.strategies.robust.norm_bound import shortened
from atoll.strategies.robust.rows import moved_by, rows_to_merge
from atoll.strategies.strategy import Plan, State


def centered_clipping(
    rows: torch.Tensor, centre: torch.Tensor, clipping_norm: float, iterations: int
) -> torch.Tensor:
    """The centre [numbers] after `iterations` clipped steps towards the rows [clients, numbers], in float64.

    >>> rows = torch.tensor([[1.0], [2.0], [1e6]], dtype=torch.float64)
    >>> centered_clipping(rows, torch.zeros(1, dtype=torch.float64), clipping_norm=3.0, iterations=1).tolist()
    [2.0]
    """
    for _ in range(iterations):
        centre = centre + shortened(rows - centre, clipping_norm).mean(dim=0)
    return centre


@dataclass(frozen=True)
class CenteredClipping:
    """Move by `lr` times the centre, which the state holds."""

    options: CenteredClippingOptions
    lr: float = 1.0

    def begin(self, model: Tensors) -> State:
        return {"centre": torch.zeros(sum(p.numel() for p in model.values()), dtype=torch.float64)}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        rows, before = rows_to_merge(model, updates, self.options), cast(torch.Tensor, state["centre"])
        centre = centered_clipping(rows, before, self.options.clipping_norm, self.options.iterations)
        return moved_by(model, centre, self.lr), {"centre": centre}
