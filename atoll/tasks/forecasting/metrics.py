"""Metrics of forecasts, with states that add up over clients.

All have `update(predictions, targets)`: predictions are [n, horizon, quantiles], of which the middle one is
the point forecast (the median, if quantiles are symmetric around it). Targets are [n, horizon + 2]: the true
values, then the last value before them, then the scale of the series.

A series' scale is the mean absolute error of the naive forecast on its training part (Hyndman and
Koehler 2006, "Another look at measures of forecast accuracy").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atoll.tasks.mean_metric import Mean


class _MeanOverSteps(Mean):
    """The mean over the steps of all forecasts of a score for each step."""

    higher_is_better = False

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the scores of forecasts [n, horizon, quantiles] with targets [n, horizon + 2].

        Raises:
            ValueError: the shapes don't fit.
        """
        if predictions.ndim != 3 or targets.shape != (len(predictions), predictions.shape[1] + 2):
            shapes = f"{list(predictions.shape)} and {list(targets.shape)}"
            raise ValueError(f"expected [n, horizon, quantiles] and [n, horizon + 2], found {shapes}")
        targets = targets.to(torch.float64)
        values, last, scale = targets[:, :-2], targets[:, -2:-1], targets[:, -1:]
        scores = self._scores(predictions.to(torch.float64), values, last, scale)
        self.score += scores.sum()
        self.total += scores.numel()

    def _scores(
        self, predictions: torch.Tensor, values: torch.Tensor, last: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """The scores of all steps that count, of any shape."""
        raise NotImplementedError


def point_forecast(predictions: torch.Tensor) -> torch.Tensor:
    """The middle quantile, [n, horizon]."""
    return predictions[:, :, predictions.shape[2] // 2]


class MeanAbsoluteError(_MeanOverSteps):
    """The mean absolute error of the point forecast (MAE)."""

    def _scores(
        self, predictions: torch.Tensor, values: torch.Tensor, last: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        return (point_forecast(predictions) - values).abs()


class RootMeanSquaredError(_MeanOverSteps):
    """The root of the mean squared error of the point forecast (RMSE), over all steps of all clients."""

    def compute(self) -> torch.Tensor:
        return super().compute().sqrt()

    def _scores(
        self, predictions: torch.Tensor, values: torch.Tensor, last: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        return (point_forecast(predictions) - values).square()


class MeanAbsoluteScaledError(_MeanOverSteps):
    """The mean absolute error over each series' scale (MASE); series with a scale of 0 are left out."""

    def _scores(
        self, predictions: torch.Tensor, values: torch.Tensor, last: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        moves = scale[:, 0] > 0
        return (point_forecast(predictions) - values).abs()[moves] / scale[moves]


class PinballLoss(_MeanOverSteps):
    """The mean over steps and quantiles q of max(q d, (q - 1) d), where d = value - forecast."""

    def __init__(self, quantiles: Sequence[float]) -> None:
        super().__init__()
        self.quantiles = tuple(quantiles)

    def _scores(
        self, predictions: torch.Tensor, values: torch.Tensor, last: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        if predictions.shape[2] != len(self.quantiles):
            raise ValueError(f"{predictions.shape[2]} quantiles forecast, expected {list(self.quantiles)}")
        levels = torch.tensor(self.quantiles, dtype=torch.float64, device=predictions.device)
        above = values[:, :, None] - predictions
        return torch.maximum(levels * above, (levels - 1) * above)


class DirectionAccuracy(_MeanOverSteps):
    """The share of steps at which forecast and value are on the same side of the last known value.

    Steps whose value equals the last known one are left out.
    """

    higher_is_better = True

    def _scores(
        self, predictions: torch.Tensor, values: torch.Tensor, last: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        moved = values != last
        same = torch.sign(point_forecast(predictions) - last) == torch.sign(values - last)
        return same[moved].to(torch.float64)
