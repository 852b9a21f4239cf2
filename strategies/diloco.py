"""DiLoCo (Douillard et al. 2023, algorithm 1): an outer step of Nesterov momentum on the clients' mean delta.

The outer gradient is minus the mean delta d, weighted by examples. v is its momentum, zero at first, mu is
`momentum` (the paper's 0.9) and `lr` the outer learning rate (0.7): v <- mu v + d, x <- x + lr (d + mu v),
which is torch's SGD with `nesterov=True`. The inner optimizer is `[train]`'s; the paper's takes H = 500 steps
of AdamW. The paper's clients keep AdamW's moments from round to round; here each round starts without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import moved, weighted_mean
from atoll.strategies.strategy import Plan, State

PREFIX = "momentum."
"""The prefix of the momentum's names in the strategy's state."""


@dataclass(frozen=True)
class DiLoCo:
    """A Nesterov step on the mean delta d: v <- `momentum` v + d, then x <- x + `lr` (d + `momentum` v)."""

    lr: float = 0.7
    momentum: float = 0.9

    def begin(self, model: Tensors) -> State:
        return {PREFIX + name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.items()}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        step: Tensors = {}
        after: State = {}
        for name, d in weighted_mean(updates).items():
            v = self.momentum * cast(torch.Tensor, state[PREFIX + name]) + d
            step[name], after[PREFIX + name] = self.lr * (d + self.momentum * v), v
        return moved(model, step), after
