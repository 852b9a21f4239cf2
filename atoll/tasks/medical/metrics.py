"""AUROC, calibration error and sensitivity at a given specificity, from counts that add up over clients.

The calibration error is that of Guo et al. 2017, "On Calibration of Modern Neural Networks". A screening test
must give few false alarms, so its sensitivity is measured at a high specificity.
"""

from __future__ import annotations

import torch
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, BinarySensitivityAtSpecificity, MulticlassAUROC


class BinnedCalibrationError(Metric):
    """Expected calibration error: the mean gap between confidence and accuracy in bins of equal width.

    Bin i of n holds confidences in (i / n, (i + 1) / n], the first also 0. Undefined (NaN) without examples.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    counts: torch.Tensor
    right: torch.Tensor
    confidence: torch.Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        for name, dtype in (("counts", torch.int64), ("right", torch.int64), ("confidence", torch.float64)):
            self.add_state(name, torch.zeros(bins, dtype=dtype), dist_reduce_fx="sum")

    def update(self, probabilities: torch.Tensor, targets: torch.Tensor) -> None:
        """Count probabilities of the positive class [n], or of all classes [n, classes], with targets [n].

        With several classes, the confidence is that of the most likely class (top-label calibration).

        Raises:
            ValueError: a probability is below 0 or above 1.
        """
        low, high = (float(v) for v in probabilities.aminmax()) if probabilities.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"probabilities from {low} to {high}, expected 0 to 1: logits aren't")
        if probabilities.ndim == 1:
            stated, came = probabilities, targets
        else:
            stated, picked = probabilities.max(dim=1)
            came = picked == targets
        stated, came = stated.to(torch.float64), came.to(torch.int64)
        place = (torch.ceil(stated * self.bins) - 1).clamp(0, self.bins - 1).to(torch.int64)
        self.counts.index_add_(0, place, torch.ones_like(place))
        self.right.index_add_(0, place, came)
        self.confidence.index_add_(0, place, stated)

    def compute(self) -> torch.Tensor:
        # n_i / n * |right_i / n_i - confidence_i / n_i|, without dividing by an empty bin's n_i.
        return (self.right - self.confidence).abs().sum() / self.counts.sum()


class SensitivityAtSpecificity(BinarySensitivityAtSpecificity):
    """The highest sensitivity, over evenly spaced thresholds, at which the specificity is high enough.

    torchmetrics' metric, whose states are counts, without the threshold that it returns as well. `update`
    takes probabilities [n] of the positive class and targets [n], 0 or 1. Undefined (NaN) if all examples are
    of one class.
    """

    def __init__(self, specificity: float = 0.95, thresholds: int = 1001) -> None:
        super().__init__(min_specificity=specificity, thresholds=thresholds)

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        sensitivity, _ = super().compute()
        return torch.where(has_both_sides(self.confmat), sensitivity, torch.nan)


class BinnedAuroc(BinaryAUROC):
    """torchmetrics' AUROC from counts at thresholds; undefined (NaN) if all examples are of one class."""

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        return torch.where(has_both_sides(self.confmat), super().compute(), torch.nan)


class BinnedMacroAuroc(MulticlassAUROC):
    """The mean over classes of the AUROC of each class against the others.

    Classes without positive or without negative examples are left out; undefined (NaN) if all are.
    """

    def __init__(self, classes: int, thresholds: int) -> None:
        super().__init__(classes, average="none", thresholds=thresholds)

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        each: torch.Tensor = super().compute()
        return each[has_both_sides(self.confmat)].mean()


def has_both_sides(counts: torch.Tensor) -> torch.Tensor:
    """Whether there are positive and negative examples, from counts [thresholds, …, true, predicted]."""
    return (counts[0].sum(-1) > 0).all(-1)
