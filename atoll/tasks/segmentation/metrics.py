"""Mean IoU and Dice, from confusion matrices of pixels that add up over clients."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class _OfConfusion(Metric):
    """The mean over classes of a score from the confusion matrix of pixels, [true class, predicted class].

    Classes that are neither true nor predicted anywhere are left out; undefined (NaN) if all are.
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
        """Count pixels by their predicted and true classes; both tensors have the same shape."""
        place = targets.flatten() * self.classes + predictions.flatten()
        counted = torch.bincount(place, minlength=self.classes**2)
        self.confusion += counted.reshape(self.classes, self.classes).to(self.confusion.device)

    def compute(self) -> torch.Tensor:
        both = self.confusion.diagonal().to(torch.float64)
        either = (self.confusion.sum(0) + self.confusion.sum(1)).to(torch.float64)
        present = either > 0
        return self.each(both[present], either[present]).mean()

    def each(self, both: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Each class's score, [classes].

        `both` has the number of pixels whose class is predicted rightly, `sizes` the number of true plus
        the number of predicted pixels.
        """
        raise NotImplementedError


class MeanIoU(_OfConfusion):
    """Mean over classes of the intersection over union."""

    def each(self, both: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return both / (sizes - both)


class Dice(_OfConfusion):
    """Mean over classes of the Dice score: twice the intersection over the sum of sizes, the F1 of pixels."""

    def each(self, both: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return 2 * both / sizes
