"""Sensitivity where specificity is high enough: what a screening test finds when it may rarely be wrong."""

from __future__ import annotations

import torch
from torchmetrics.classification import BinarySensitivityAtSpecificity


class SensitivityAtSpecificity(BinarySensitivityAtSpecificity):
    """The highest sensitivity over `thresholds` evenly spaced thresholds with at least that specificity.

    torchmetrics' own, whose states are counts, without the threshold that it returns too. `update` takes
    probabilities [n] of the positive class and targets [n], 0 or 1.
    """

    def __init__(self, specificity: float = 0.95, thresholds: int = 1001) -> None:
        super().__init__(min_specificity=specificity, thresholds=thresholds)

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        sensitivity, _ = super().compute()
        return sensitivity
