"""Accuracy of intents, and F1 of slots."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from atoll.tasks.token_classification.metrics import EntityF1


class IntentAccuracy(Metric):
    """The share of commands whose intent is predicted rightly."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: torch.Tensor
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count commands by the intent, the first number of each row [n, 1 + words]."""
        self.right += (predictions[:, 0] == targets[:, 0]).sum()
        self.total += len(targets)

    def compute(self) -> torch.Tensor:
        return self.right.to(torch.float64) / self.total


class CommandSlotF1(EntityF1):
    """Micro F1 of slots, which are spans of tags."""

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count spans of tags, the numbers after the first of each row [n, 1 + words]."""
        super().update(predictions[:, 1:], targets[:, 1:])
