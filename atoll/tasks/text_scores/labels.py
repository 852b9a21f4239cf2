"""Multi-label classification of texts: a linear head with a sigmoid for each label.

Loss: binary cross-entropy, the mean over labels, then over texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import torch
from torch import nn

from atoll.backbones.options import refuse_options
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import shown
from atoll.data.parsers import name_cell
from atoll.data.schema import Schema, SchemaField
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.classes import agreed, class_fields, named, pinned_names
from atoll.tasks.text_scores.encoded import TEXT, TextFeatures

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def labels_cell(cell: Any, where: str) -> list[str]:
    """The labels in a cell, sorted and without duplicates; the cell is a list or JSON text of one, or empty.

    >>> labels_cell('["price", "food", "price"]', ""), labels_cell([], "")
    (['food', 'price'], [])

    Raises:
        DataError: the cell is no list of names.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise DataError(
                f'{where}: {shown(repr(cell[:40]))}, expected a list such as ["a", "b"]'
            ) from None
    if not isinstance(cell, list):
        raise DataError(
            f"{where}: {'nothing' if cell is None else type(cell).__name__}, expected a list of labels"
        )
    return sorted({name_cell(one, f"{where}: a label") for one in cell})


LABELLED = Schema(
    (TEXT, SchemaField("labels", labels_cell, pa.list_(pa.string()), ("label", "tags", "topics", "classes")))
)


@dataclass(frozen=True)
class TextLabels(TextFeatures):
    """Multi-label classification; targets are [n, labels], 1 where a text has the label, else 0."""

    info_fields = class_fields("labels", "labels")

    name: str = "text-labels"
    summary: str = "several labels at once for a text; any transformers encoder; macro F1, exact sets, mAP"
    primary_metric: str = "macro_f1"
    head_loss: Literal["softmax", "sigmoid", "squared"] = "sigmoid"

    def check(self, job: Job) -> None:
        refuse_options(job.task.options, "task.options", self.name)
        super().check(job)

    def records(self, options: Options) -> Schema:
        return LABELLED

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The labels: those of `data.classes` in its order, else those of the data, sorted.

        Raises:
            DataError: the data has a label that isn't in `data.classes`.
        """
        return named({label for labels in dataset["labels"] for label in labels}, data, "labels", "label")

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The numbers of the rows whose labels are all in `data.classes`; all rows if that isn't set."""
        known, labels = set(pinned_names(data)), dataset["labels"][:]
        return [row for row in range(len(dataset)) if data.classes is None or known.issuperset(labels[row])]

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The labels of `data.classes`, else the sorted union of the clients' labels.

        Raises:
            ConfigError: there is no label.
        """
        labels = agreed(data_info, "labels")
        if not labels:
            raise ConfigError(f"{self.name} needs at least one label, found none in the data")
        return {"labels": labels}

    def targets(self, dataset: Dataset, order: Sequence[int], data_info: DataInfo) -> torch.Tensor:
        place = {label: number for number, label in enumerate(data_info["labels"])}
        targets, label_lists = torch.zeros(len(order), len(place)), dataset["labels"][:]
        for target, row in zip(targets, order, strict=True):
            if unknown := [label for label in label_lists[row] if label not in place]:
                raise DataError(
                    f"label {unknown[0]!r} is not one of the run's {data_info['labels']}; data.classes can"
                    " name them all"
                )
            target[[place[label] for label in label_lists[row]]] = 1.0
        return targets

    def head(self, width: int, data_info: DataInfo) -> nn.Module:
        return nn.Linear(width, len(data_info["labels"]))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.text_scores.metrics import BinnedMap, MacroF1, SubsetAccuracy

        count = len(data_info["labels"])
        metrics: Any = {
            "macro_f1": MacroF1(count), "subset_accuracy": SubsetAccuracy(), "map": BinnedMap(count),
        }  # fmt: skip
        return MetricCollection(metrics, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(each label's probability, whether the text has it), both [n, labels]."""
        return torch.sigmoid(predictions), targets.to(torch.int64)

    def format_predictions(self, predictions: torch.Tensor, data_info: DataInfo) -> list[dict[str, Any]]:
        """The labels with a probability above 0.5, and all probabilities."""
        rows: list[dict[str, Any]] = []
        for row in torch.sigmoid(predictions).tolist():
            chances = {name: round(p, 4) for name, p in zip(data_info["labels"], row, strict=True)}
            labels = [name for name, p in zip(data_info["labels"], row, strict=True) if p > 0.5]
            rows.append({"label": ", ".join(labels) or "none", "labels": labels, "all": chances})
        return rows


TEXT_LABELS = TextLabels()
