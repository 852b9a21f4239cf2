"""The mean of scores, as a sum and a count that add up over clients."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class Mean(Metric):
    """What a metric adds to `score`, over `total`; undefined (NaN) where nothing was counted."""

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
