"""Hit rate and NDCG of the held-out item of each user (leave-one-out)."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class _Ranks(Metric):
    """Counts how often the held-out item has each of the ranks 0 to k - 1; undefined (NaN) without items."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    at: torch.Tensor
    total: torch.Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.add_state("at", torch.zeros(k, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ranks: torch.Tensor) -> None:
        """Count held-out items by their rank [n], from 0 for the best; -1 where there is no item."""
        self.at += torch.bincount(ranks[(ranks >= 0) & (ranks < self.k)], minlength=self.k)
        self.total += (ranks >= 0).sum()


class HitRate(_Ranks):
    """HR@k: the share of held-out items that are among the first k."""

    def compute(self) -> torch.Tensor:
        return self.at.sum().to(torch.float64) / self.total


class Ndcg(_Ranks):
    """NDCG@k: the mean of 1 / log2(2 + rank) over held-out items, 0 from rank k on; the ideal DCG is 1."""

    def compute(self) -> torch.Tensor:
        places = torch.arange(self.k, dtype=torch.float64, device=self.at.device)
        return (self.at / torch.log2(places + 2)).sum() / self.total
