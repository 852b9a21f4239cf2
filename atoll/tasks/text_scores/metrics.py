"""Metrics of multi-label classification and regression, with states that add up over clients."""

from __future__ import annotations

import torch
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision

from atoll.tasks.mean_metric import Mean

BINS = 100
REACH = 5.0
"""Numbers are binned up to this many standard deviations from the mean, to compute their ranks."""


class SubsetAccuracy(Mean):
    """The share of texts for which all labels are predicted rightly."""

    higher_is_better = True

    def update(self, probabilities: torch.Tensor, targets: torch.Tensor) -> None:
        """Count texts; both are [n, labels], and a label with a probability above 0.5 is predicted."""
        self.score += ((probabilities > 0.5) == (targets > 0)).all(dim=1).sum()
        self.total += len(targets)


class MacroF1(Metric):
    """The mean F1 over the labels that are true or predicted somewhere; undefined (NaN) if none is."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    matched: torch.Tensor
    counted: torch.Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        for name in ("matched", "counted"):
            self.add_state(name, torch.zeros(labels, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: torch.Tensor, targets: torch.Tensor) -> None:
        """Count predicted and true labels; both are [n, labels]."""
        predicted, there = probabilities > 0.5, targets > 0
        self.matched += (predicted & there).sum(0)
        self.counted += predicted.sum(0) + there.sum(0)

    def compute(self) -> torch.Tensor:
        real = self.counted > 0
        return (2 * self.matched[real].to(torch.float64) / self.counted[real]).mean()


class BinnedMap(MultilabelAveragePrecision):
    """Mean average precision over labels, from counts at 201 evenly spaced thresholds.

    torchmetrics' metric without the labels that no text has; undefined (NaN) if no text has any.
    """

    def __init__(self, labels: int) -> None:
        super().__init__(labels, average="none", thresholds=201)

    def compute(self) -> torch.Tensor:  # type: ignore[override]
        there = self.confmat[0, :, 1].sum(dim=1) > 0
        each: torch.Tensor = super().compute()
        return each[there].mean()


class ScaledError(Mean):
    """The mean absolute error of standardised numbers, converted to their original unit."""

    higher_is_better = False

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count standardised numbers, both [n]."""
        self.score += (predictions - targets).abs().sum() * self.deviation
        self.total += len(targets)


class Pearson(Metric):
    """Pearson's correlation; undefined (NaN) if either side is constant."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Add up numbers and their products; both are [n]."""
        rows = torch.stack([torch.ones_like(predictions), predictions, targets])
        self.sums += (rows @ rows.T).to(self.sums)

    def compute(self) -> torch.Tensor:
        return correlation(self.sums)


class BinnedSpearman(Metric):
    """Spearman's correlation of numbers rounded to 0.1 standard deviations and clipped at 5 from the mean.

    Ranks don't add up over clients, but counts of rounded pairs do. Ties get the mean of their ranks.
    Undefined (NaN) if either side is constant.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(BINS, BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count pairs of standardised numbers; both are [n]."""
        predicted, true = (_bin(values) for values in (predictions, targets))
        counts = torch.bincount(predicted * BINS + true, minlength=BINS * BINS)
        self.counts += counts.reshape(BINS, BINS).to(self.counts)

    def compute(self) -> torch.Tensor:
        counts = self.counts.to(torch.float64)
        predicted, true = (_ranks(counts.sum(axis)) for axis in (1, 0))
        rows, columns = counts.sum(1), counts.sum(0)
        one, other, both = rows @ predicted, columns @ true, predicted @ counts @ true
        squares = (rows @ predicted.square(), columns @ true.square())
        number = counts.sum()
        return correlation(
            torch.stack([number, one, other, one, squares[0], both, other, both, squares[1]]).reshape(3, 3)
        )


def _bin(values: torch.Tensor) -> torch.Tensor:
    place = torch.floor((values + REACH) * (BINS / (2 * REACH))).clamp(0, BINS - 1)
    return place.to(torch.int64)


def _ranks(counts: torch.Tensor) -> torch.Tensor:
    """The mean rank of the values in each bin, from the number of values in each."""
    return counts.cumsum(0) - (counts - 1) / 2


def correlation(sums: torch.Tensor) -> torch.Tensor:
    """Pearson's correlation of x and y, from the sums of the outer products of (1, x, y), [3, 3]."""
    number = sums[0, 0]
    spread = sums[1:, 1:] * number - torch.outer(sums[0, 1:], sums[0, 1:])
    variances = spread.diagonal()
    varies = (variances > 1e-12 * number * sums.diagonal()[1:]).all()  # less is what rounding leaves
    return torch.where(varies, spread[0, 1] / variances.clamp_min(0).sqrt().prod(), torch.nan)
