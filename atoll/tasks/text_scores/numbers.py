"""Regression on texts: a linear head that predicts a standardised number from a text's features.

Loss: the mean squared error of numbers from which the mean is subtracted, divided by their deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
import torch
from pydantic import Field
from torch import nn

from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.data.dataset import Dataset
from atoll.data.parsers import number_cell
from atoll.data.schema import Schema, SchemaField
from atoll.errors import ConfigError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options, Positive, Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.data_info import InfoField
from atoll.tasks.text_scores.encoded import TEXT, TextFeatures

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

NUMBERED = Schema(
    (TEXT, SchemaField("number", number_cell, pa.float64(), ("score", "rating", "stars", "value", "label")))
)


class NumberOptions(Section):
    """`task.options` of text regression: the mean and deviation to standardise by; by default the data's."""

    mean: Annotated[float, Field(allow_inf_nan=False)] | None = None
    deviation: Positive | None = None


@dataclass(frozen=True)
class TextRegression(TextFeatures):
    """Regression; targets are [n, 1], standardised by the mean and deviation that all clients agree on."""

    info_fields = (
        InfoField("moments", "example", "task.options.mean", "the mean and deviation of the numbers"),
        InfoField("given", "public", holds="flag"),
    )

    name: str = "text-regression"
    summary: str = "a number for a text; any transformers encoder; MAE, Pearson and Spearman correlation"
    primary_metric: str = "mae"
    head_loss: Literal["softmax", "sigmoid", "squared"] = "squared"
    options: NumberOptions = field(default_factory=NumberOptions)

    def configured(self, job: Job, backbone: Backbone) -> TextRegression:
        return replace(self, options=options_of(job.task.options, NumberOptions))

    def check(self, job: Job) -> None:
        options = options_of(job.task.options, NumberOptions)
        if (options.mean is None) != (options.deviation is None):
            missing = "mean" if options.mean is None else "deviation"
            raise ConfigError(
                f"task.options.{missing}: missing, expected both mean and deviation, or neither"
            )
        super().check(job)

    def records(self, options: Options) -> Schema:
        return NUMBERED

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The count, sum and sum of squares of the numbers; nothing of them if the job gives the scale."""
        if options_of(options, NumberOptions).mean is not None:
            return {"given": True}
        numbers = dataset["number"][:]
        return {"moments": [len(numbers), sum(numbers), sum(number * number for number in numbers)]}

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The mean and standard deviation of all clients' numbers; empty if the job gives them.

        Raises:
            ConfigError: the numbers are all the same, or not finite.
        """
        if any(info.get("given") for info in data_info):
            return {}
        count, total, squares = (sum(info["moments"][place] for info in data_info) for place in range(3))
        mean = total / max(count, 1)
        variance = squares / max(count, 1) - mean * mean
        if not isfinite(variance) or variance <= 1e-12 * max(1.0, mean * mean):
            raise ConfigError(
                f"{self.name} needs finite numbers that differ, found {count} with the mean {mean:g}"
            )
        return {"mean": mean, "deviation": sqrt(variance)}

    def scale(self, data_info: DataInfo) -> tuple[float, float]:
        """(mean, standard deviation): the job's, or those of the training data."""
        if self.options.mean is not None and self.options.deviation is not None:
            return self.options.mean, self.options.deviation
        return float(data_info["mean"]), float(data_info["deviation"])

    def targets(self, dataset: Dataset, order: Sequence[int], data_info: DataInfo) -> torch.Tensor:
        (mean, deviation), numbers = self.scale(data_info), dataset["number"][:]
        plain = torch.tensor([numbers[row] for row in order], dtype=torch.float64)
        return ((plain - mean) / deviation).to(torch.float32).unsqueeze(1)

    def head(self, width: int, data_info: DataInfo) -> nn.Module:
        return nn.Linear(width, 1)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, targets.to(outputs.dtype))

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.text_scores.metrics import BinnedSpearman, Pearson, ScaledError

        metrics: Any = {
            "mae": ScaledError(self.scale(data_info)[1]), "pearson": Pearson(), "spearman": BinnedSpearman(),
        }  # fmt: skip
        return MetricCollection(metrics, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """Predicted and true standardised numbers, float64, both [n]."""
        return predictions[:, 0].to(torch.float64), targets[:, 0].to(torch.float64)

    def format_predictions(self, predictions: torch.Tensor, data_info: DataInfo) -> list[dict[str, Any]]:
        """The predicted number, on the scale of the data."""
        mean, deviation = self.scale(data_info)
        numbers = [mean + deviation * value for value in predictions[:, 0].tolist()]
        return [{"label": f"{number:.4g}", "number": number} for number in numbers]


TEXT_REGRESSION = TextRegression()
