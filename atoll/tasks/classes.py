"""Shared parts of classification tasks: agreeing on the classes, the loss and the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atoll.data.dataset import Dataset
from atoll.data.labels import value_name
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.data_info import MOST_CLASSES, PINNED, InfoField
from atoll.tasks.task import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def class_fields(
    key: str = "classes", what: str = "classes", at_most: int = MOST_CLASSES
) -> tuple[InfoField, ...]:
    """The `info_fields` of a task whose `local_info` lists the data's names (classes, tags) under `key`.

    The job can state them as `data.classes`; `what` is their name in messages, `at_most` their largest count.
    """
    return InfoField(key, "example", "data.classes", f"the list of {what}", "names", at_most), PINNED


def rows_named(names: Sequence[str], data: DataSection) -> Sequence[int]:
    """The numbers of the rows whose name is in the job's `data.classes`; all rows if that isn't set."""
    if data.classes is None:
        return range(len(names))
    known = set(pinned_names(data))
    return [row for row, name in enumerate(names) if name in known]


def named(present: set[str], data: DataSection, key: str, what: str) -> DataInfo:
    """{key: names}: those of the job's `data.classes`, marked as pinned, else the data's, sorted.

    Raises:
        DataError: the data has a name that isn't in `data.classes`.
    """
    if data.classes is None:
        return {key: sorted(present)}
    pinned = pinned_names(data)
    unknown = sorted(present - set(pinned))
    if unknown:
        raise DataError(f"{what} {unknown[0]!r} is not in data.classes = {list(data.classes)}")
    return {key: pinned, "pinned": True}


def pinned_names(data: DataSection) -> list[str]:
    """The job's `data.classes`, in the form in which the data's names are read; empty if it isn't set."""
    return [value_name(name) or name for name in data.classes or ()]


def agreed(data_info: Sequence[DataInfo], key: str) -> list[str]:
    """The names under `key` that hold for all clients: the job's, else the sorted union of the clients'."""
    pinned = next((f for f in data_info if f.get("pinned")), None)
    return list(pinned[key]) if pinned else sorted({name for f in data_info for name in f[key]})


class Labelled(Task):
    """A task that predicts one class per example: linear head, cross-entropy, accuracy, macro F1."""

    info_fields = class_fields()

    def targets(self, labels: Sequence[str], order: Sequence[int], data_info: DataInfo) -> torch.Tensor:
        """The class numbers of the rows in the given order, int64, [n].

        Raises:
            DataError: a class isn't among the run's classes.
        """
        index = {name: i for i, name in enumerate(data_info["classes"])}
        try:
            return torch.tensor([index[labels[row]] for row in order], dtype=torch.int64)
        except KeyError as unknown:
            raise DataError(
                f"label {unknown} is not one of the run's classes {data_info['classes']}; data.classes can"
                " name them all"
            ) from None

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The classes: those of `data.classes` in its order, else those of the data, sorted.

        Raises:
            DataError: the data has a class that isn't in `data.classes`.
        """
        return named(set(dataset["label"]), data, "classes", "label")

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The numbers of the rows whose class is in `data.classes`; all rows if that isn't set."""
        return rows_named(dataset["label"][:], data)

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The classes of `data.classes`, else the sorted union of the clients' classes.

        Raises:
            ConfigError: there are fewer than two classes.
        """
        classes = agreed(data_info, "classes")
        if len(classes) < 2:
            raise ConfigError(f"classification needs at least two classes, found {classes}")
        return {"classes": classes}

    def head(self, width: int, data_info: DataInfo) -> nn.Module:
        return nn.Linear(width, len(data_info["classes"]))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        count = len(data_info["classes"])
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "macro_f1": MulticlassF1Score(count, average="macro"),
            },
            compute_groups=False,
        )

    def format_predictions(self, predictions: torch.Tensor, data_info: DataInfo) -> list[dict[str, Any]]:
        """The most likely class, its probability, and the probabilities of all classes."""
        rows = []
        for row in torch.softmax(predictions, dim=-1):
            best = int(row.argmax())
            probabilities = {c: round(float(p), 4) for c, p in zip(data_info["classes"], row, strict=True)}
            rows.append(
                {"label": data_info["classes"][best], "probability": float(row[best]), "all": probabilities}
            )
        return rows
