"""How well regions of pixels agree, from counts of (true class, said class) that add up over clients."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class _OfConfusion(Metric):
    """The mean of a number for every class; a class that is neither there nor said isn't averaged over.

    Without any class it is undefined (NaN).
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: torch.Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Said and true classes of pixels, of one shape; none at all count as nothing."""
        place = targets.flatten() * self.classes + predictions.flatten()
        counted = torch.bincount(place, minlength=self.classes**2)
        self.confusion += counted.reshape(self.classes, self.classes).to(self.confusion.device)

    def compute(self) -> torch.Tensor:
        both = self.confusion.diagonal().to(torch.float64)
        either = (self.confusion.sum(0) + self.confusion.sum(1)).to(torch.float64)
        present = either > 0
        return self.each(both[present], either[present]).mean()

    def each(self, both: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Of every class: `both` is how many pixels are rightly said, `sizes` how many are there or said."""
        raise NotImplementedError


class MeanIoU(_OfConfusion):
    """Intersection over union, the mean over classes."""

    def each(self, both: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return both / (sizes - both)


class Dice(_OfConfusion):
    """Twice the intersection over the sum of sizes (F1 of pixels), the mean over classes."""

    def each(self, both: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return 2 * both / sizes
