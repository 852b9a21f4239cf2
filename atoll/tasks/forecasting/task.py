"""Time series forecasting: predicts quantiles of future values, and compares them with naive forecasts.

Loss: the pinball loss (Koenker and Bassett 1978), divided by the series' mean change from season to season,
so that clients with large values don't dominate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from atoll.backbones.encoder import Batch, Model
from atoll.backbones.options import options_of, refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Findings, Table
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.lazy import LazyRows
from atoll.data.schema import whole
from atoll.data.shard import Shard, canonical_order
from atoll.data.tables import SUFFIXES
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.protocol.validation_split import by_fraction, validation_marks
from atoll.tasks.forecasting.data import WINDOWS, ForecastOptions, dated, last_windows, windows_of
from atoll.tasks.forecasting.models import load_forecaster
from atoll.tasks.forecasting.written import forecast_csv, forecast_plot
from atoll.tasks.moments import in_time
from atoll.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class Forecasting(Task):
    """Forecasting; targets are [n, horizon + 2]: the values, the last one before them, the series' scale."""

    info_fields = ()

    name: str = "forecasting"
    summary: str = "the next steps of a series; LSTM, GRU, PatchTST; MAE, RMSE, MASE, pinball loss, direction"
    uses_pooled_features: bool = False
    has_own_split: bool = True
    primary_metric: str = "mase"
    options: ForecastOptions = field(default_factory=ForecastOptions)
    reads_times: bool = True
    time_format: str | None = None

    def configured(self, job: Job, backbone: Backbone) -> Forecasting:
        options = options_of(job.task.options, ForecastOptions)
        return replace(self, options=options, time_format=job.data.time_format)

    def check(self, job: Job) -> None:
        options = options_of(job.task.options, ForecastOptions)
        if list(options.quantiles) != sorted(set(options.quantiles)) or len(options.quantiles) % 2 == 0:
            raise ConfigError(
                "task.options.quantiles: expected an odd number of them in order, such as [0.1, 0.5, 0.9]:"
                f" the middle one is the forecast; found {list(options.quantiles)}"
            )
        if options.history < options.season:
            raise ConfigError(
                f"task.options.history: expected at least a season ({options.season}),"
                f" found {options.history}"
            )
        if job.backbone.name.startswith("atoll:") and job.tune.method in ("last-k", "lora"):
            raise ConfigError(
                f"tune.method: {job.backbone.name} has no blocks and no linear layer,"
                f" expected 'head' or 'full', found {job.tune.method!r}"
            )
        refuse_augment(job)

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        diagnostics = Diagnostics()
        return WINDOWS.table_of(source, self._gathered(source, data, options, diagnostics), diagnostics)

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        diagnostics = Diagnostics()
        try:
            splits = self._gathered(source, data, options, diagnostics)
        except DataError:
            if not diagnostics.problems:
                raise
            splits = {}
        return WINDOWS.findings_of(source, splits, diagnostics)

    def _gathered(
        self, source: Path, data: DataSection, table: Options, diagnostics: Diagnostics
    ) -> dict[str, pa.Table]:
        """The tables of windows at a path: as they are stored there, or cut from dated rows."""
        options = options_of(table, ForecastOptions)
        if WINDOWS.has(source, "history", "future"):
            return WINDOWS.gather(source, data, diagnostics)
        steps = dated(options, data.time_format).gather(source, data, diagnostics)
        diagnostics.close()
        fraction = 0.0 if "test" in steps or data.test is not None else data.test_fraction
        made = windows_of(steps["train"], options, fraction, shown(source), diagnostics)
        if "test" in steps:
            made["test"] = windows_of(steps["test"], options, 0.0, shown(source), diagnostics)["train"]
        return made

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        options = options_of(job.task.options, ForecastOptions)
        for name in (*options.observed, *options.known):
            if name not in splits["train"].column_names:
                known = ", ".join(splits["train"].column_names)
                raise ConfigError(f"task.options: {job.data.source} has no column {name!r}, found {known}")
        rows = whole(splits)
        diagnostics = Diagnostics(rows_read=rows.num_rows)
        made = windows_of(rows, options, job.data.test_fraction, job.data.source, diagnostics)
        return WINDOWS.adopted(made, diagnostics.counts_of(0))

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        WINDOWS.write(dataset, folder, DataSection(source=data.source))

    def keys(self, dataset: Dataset) -> list[bytes]:
        return WINDOWS.keys(dataset)

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        return {}

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        return {}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        rows = dataset.select_columns(["series", "first", "last", "history", "future", "observed", "known"])[
            :
        ]
        targets = [_target(rows["history"][row], rows["future"][row], self.options.season) for row in order]
        inputs = LazyRows(
            lambda row: {name: rows[name][row] for name in ("history", "observed", "known")}, tuple(order)
        )
        groups = tuple(f"{rows['first'][row]}/{rows['last'][row]}/{rows['series'][row]}" for row in order)
        values = torch.tensor(targets, dtype=torch.float64)
        return Shard(inputs, values, tuple(keys[row] for row in order), groups)

    def split(
        self, shard: Shard, seed: int, fraction: float, *, helped: bool = True
    ) -> tuple[list[int], list[int]]:
        """(training rows, validation rows): a hash of a series' name decides for all its windows.

        With `helped`, a client whose series are all on one side is split by time instead, and validates on
        the last part.
        """
        names = [_span_and_series(group)[2].encode() for group in shard.groups]
        is_validation = by_fraction(validation_marks(names, seed), fraction, helped=fraction >= 1)
        if helped and fraction and (is_validation.all() or not is_validation.any()):
            return _last_part_of_the_time(shard, fraction)
        return np.flatnonzero(~is_validation).tolist(), np.flatnonzero(is_validation).tolist()

    def input_suffixes(self) -> tuple[str, ...]:
        return SUFFIXES

    def parse_input(self, text: str) -> Any:
        """The last window of a file of dated rows; rows without a value hold known covariates of the future.

        Raises:
            DataError: the file is invalid, or its series too short, or it holds several series.
        """
        windows = self.parse_inputs(text)
        if len(windows) > 1:
            raise DataError(f"{text}: several series, expected one")
        return next(iter(windows.values()))

    def parse_inputs(self, text: str) -> dict[str, Any]:
        """The last window of every series in a file of dated rows, by the series' names."""
        windows = last_windows(Path(text), self.options, self.time_format)
        return {"": next(iter(windows.values()))} if len(windows) == 1 else dict(windows)

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        return load_forecaster(backbone, job, options_of(job.task.options, ForecastOptions))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The pinball loss divided by each series' scale, the mean over steps and quantiles."""
        levels = torch.tensor(self.options.quantiles, dtype=outputs.dtype, device=outputs.device)
        values, scale = targets[:, :-2].to(outputs.dtype), targets[:, -1].to(outputs.dtype)
        above = (values.unsqueeze(2) - outputs) / scale.view(-1, 1, 1)
        return torch.maximum(levels * above, (levels - 1) * above).mean()

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.forecasting.metrics import (
            DirectionAccuracy,
            MeanAbsoluteError,
            MeanAbsoluteScaledError,
            PinballLoss,
            RootMeanSquaredError,
        )

        return MetricCollection(
            {
                "mae": MeanAbsoluteError(),
                "rmse": RootMeanSquaredError(),
                "mase": MeanAbsoluteScaledError(),
                "pinball": PinballLoss(self.options.quantiles),
                "direction": DirectionAccuracy(),
            },
            compute_groups=False,
        )

    def naive_baselines(self, shard: Shard, data_info: DataInfo) -> dict[str, Any]:
        """Two naive forecasts, as predictions: the last value repeated, and the last season repeated."""
        horizon, season = self.options.horizon, self.options.season
        history = torch.tensor([window["history"] for window in shard.inputs], dtype=torch.float64)
        ahead = torch.arange(horizon)
        seasonal = history[:, history.shape[1] - season + ahead % season]
        forecasts = {"naive": history[:, -1:].expand(-1, horizon), "seasonal_naive": seasonal}
        count = len(self.options.quantiles)
        return {name: values.unsqueeze(2).expand(-1, -1, count) for name, values in forecasts.items()}

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """The middle quantile of every step as `label`, and all quantiles."""
        middle = len(self.options.quantiles) // 2
        names = [str(level) for level in self.options.quantiles]
        rows = []
        for steps in predictions.tolist():
            label = ", ".join(f"{step[middle]:.6g}" for step in steps)
            quantiles = {name: [step[place] for step in steps] for place, name in enumerate(names)}
            rows.append({"label": label, "quantiles": quantiles})
        return rows

    def answers(
        self, model: Model, batch: Batch, inputs: Sequence[Any], data_info: DataInfo
    ) -> list[dict[str, Any]]:
        """As `format_predictions`, with the `dates` of the forecast steps, empty if they aren't known."""
        answers = super().answers(model, batch, inputs, data_info)
        return [answer | {"dates": window["ahead"]} for answer, window in zip(answers, inputs, strict=True)]

    def files(
        self, answer: Mapping[str, Any], source: Any, data_info: DataInfo, *, overlay: bool
    ) -> dict[str, bytes]:
        """The forecast as a CSV table, and a plot of history and forecast."""
        return {"forecast.csv": forecast_csv(answer), "forecast.png": forecast_plot(answer, source)}


def _span_and_series(group: str) -> tuple[str, str, str]:
    """(date of a window's first step to forecast, date of its last one, its series) from its group."""
    first, last, series = group.split("/", 2)
    return first, last, series


def _last_part_of_the_time(shard: Shard, fraction: float) -> tuple[list[int], list[int]]:
    """(windows before a date, windows from that date on); windows that contain the date are in neither."""
    spans = [tuple(map(in_time, _span_and_series(group)[:2])) for group in shard.groups]
    firsts = sorted(first for first, _ in spans)
    wanted = int(fraction) if fraction >= 1 else round(len(spans) * fraction)
    count = min(max(1, wanted), len(spans) - 1)
    if count < 1:
        return list(range(len(spans))), []
    cut = firsts[-count]
    train = [row for row, (_, last) in enumerate(spans) if last < cut]
    if not train:
        return list(range(len(spans))), []
    return train, [row for row, (first, _) in enumerate(spans) if first >= cut]


def _target(history: list[float], future: list[float], season: int) -> list[float]:
    """The future values, the last known value, and the mean change from season to season (1 if that is 0)."""
    changes = [abs(after - before) for before, after in zip(history, history[season:], strict=False)]
    scale = sum(changes) / len(changes) if changes else 0.0
    return [*future, history[-1], scale or 1.0]


FORECASTING = Forecasting()
