"""The base class of metrics that are a mean, with a sum and a count that add up over clients."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class Mean(Metric):
    """The ratio `score` / `total` of what `update` adds to them; undefined (NaN) if nothing was counted."""

    is_differentiable = False
    full_state_update = False
    score: torch.Tensor
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("score", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> torch.Tensor:
        return self.score / self.total
