"""Survival analysis by Cox's proportional hazards model, from data with censored patients.

Loss: the negative log partial likelihood of a batch (`loss.py`), in which a patient's term depends on the
other patients in the batch. Metric: the concordance index within each client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atoll.backbones.encoder import Model
from atoll.backbones.options import options_of, refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Findings, Table
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Diagnostics
from atoll.data.lazy import LazyRows
from atoll.data.shard import Shard, canonical_order
from atoll.data.tables import SUFFIXES
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.data_info import InfoField
from atoll.tasks.survival.data import (
    EVENT,
    MOST_FEATURES,
    TIME,
    SurvivalOptions,
    feature_cell,
    gathered,
    in_one_cell,
    patients,
    rows_to_score,
    same_features,
)
from atoll.tasks.survival.loss import cox_loss
from atoll.tasks.survival.models import load_cox
from atoll.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

SHARED = "Cox's loss compares the examples of a batch with one another"


@dataclass(frozen=True)
class Survival(Task):
    """Survival analysis; inputs are {feature: number}; targets are [n, 2]: the time, and 1 for an event."""

    info_fields = (
        InfoField(
            "features", "example", "task.options.features", "the names of the columns that are features",
            "names", MOST_FEATURES,
        ),
    )  # fmt: skip

    name: str = "survival"
    summary: str = "how soon an event comes, with censoring; linear Cox model, MLP; concordance index"
    uses_pooled_features: bool = False
    compares_examples: bool = True
    primary_metric: str = "c_index"
    options: SurvivalOptions = field(default_factory=SurvivalOptions)

    def configured(self, job: Job, backbone: Backbone) -> Survival:
        return replace(self, options=options_of(job.task.options, SurvivalOptions))

    def check(self, job: Job) -> None:
        options_of(job.task.options, SurvivalOptions)
        if "example" in job.privacy.units:
            raise ConfigError(
                f"privacy.unit: survival has no example-level privacy, found {job.privacy.unit!r}: {SHARED},"
                ' so that no example has a gradient of its own; expected "client" or "none"'
            )
        if job.train.accumulate > 1:
            raise ConfigError(
                f"train.accumulate: expected 1 for survival, found {job.train.accumulate}: {SHARED}, so that"
                " parts don't add up"
            )
        if job.tune.method in ("last-k", "lora"):
            raise ConfigError(
                f"tune.method: {job.backbone.name} has no blocks to choose from, expected 'head' or 'full',"
                f" found {job.tune.method!r}"
            )
        refuse_augment(job)

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        diagnostics = Diagnostics()
        table = gathered(source, data, options_of(options, SurvivalOptions), diagnostics)
        return patients([]).table_of(source, table, diagnostics)

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        diagnostics = Diagnostics()
        table = gathered(source, data, options_of(options, SurvivalOptions), diagnostics)
        return patients([]).findings_of(source, table, diagnostics)

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        import pyarrow as pa

        chosen = options_of(job.task.options, SurvivalOptions).features
        taken = (TIME.name, EVENT.name, getattr(job.data.partition, "by", None))
        schema = splits["train"].schema
        numbers = [one.name for one in schema if pa.types.is_floating(one.type) and one.name not in taken]
        for name in chosen or ():
            if name not in numbers:
                raise ConfigError(
                    f"task.options.features: {job.data.source} has no feature {name!r}, found"
                    f" {', '.join(numbers)}"
                )
        names = sorted(numbers) if chosen is None else chosen
        return patients([]).adopted({part: in_one_cell(table, names) for part, table in splits.items()})

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        patients([]).write(dataset, folder, data)

    def keys(self, dataset: Dataset) -> list[bytes]:
        return patients([]).keys(dataset)

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The names of the features: those of the job in its order, else those of the data, sorted."""
        chosen = options_of(options, SurvivalOptions).features
        kind = dataset.schema.field("features").type
        return {"features": list(chosen or sorted(one.name for one in kind))}

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        return {"features": same_features([info["features"] for info in data_info])}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        features, times, events = dataset["features"][:], dataset["time"][:], dataset["event"][:]
        targets = torch.tensor([[times[row], events[row]] for row in order], dtype=torch.float64)
        inputs = LazyRows(lambda row: features[row], tuple(order))
        return Shard(inputs, targets.reshape(-1, 2), tuple(keys[row] for row in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return SUFFIXES

    def parse_inputs(self, text: str) -> dict[str, Any]:
        """One patient given as JSON, or all patients of a table, by row ("row 1")."""
        if not text.lower().endswith(SUFFIXES):
            return {"": self.parse_input(text)}
        return rows_to_score(Path(text), self.options.features)

    def parse_input(self, text: str) -> Any:
        """A patient's features from JSON such as `{"age": 61, "grade": 2}`; other keys are ignored.

        Raises:
            DataError: the text is no JSON object, or a feature is no number.
        """
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f'input {text[:40]!r}: expected features as JSON, such as {{"age": 61}}')
        names = [name for name in self.options.features or row if name in row]
        return {name: feature_cell(name)(row[name], "input") for name in names}

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        return load_cox(backbone, job, self.options, data_info["features"])

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cox's loss for scores [n] of the patients in a batch."""
        return cox_loss(outputs, targets[:, 0], targets[:, 1])

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.survival.metrics import ConcordanceIndex

        return MetricCollection({"c_index": ConcordanceIndex()}, compute_groups=False)

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """The score, and the hazard exp(score) relative to a patient with score 0."""
        return [
            {"label": f"{score:.4g}", "score": score, "relative_hazard": hazard}
            for score, hazard in zip(predictions.tolist(), predictions.double().exp().tolist(), strict=True)
        ]


SURVIVAL = Survival()
