"""Text and image classification: a linear head on a backbone's features, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from protocol.errors import ConfigError, DataError
from protocol.job import BackboneSection, DataSection, Job, Options
from protocol.messages import Facts
from tasks.augment import IMAGE_AUGMENTATIONS, TEXT_AUGMENTATIONS
from tasks.columns import Columns
from tasks.images import image_bytes, read_image_input
from tasks.lazy import Cells, Picked
from tasks.reading import Findings, Table, example_keys, inspect, read_images, read_texts, table_of
from tasks.seam import Encoder, Shard, Task, canonical_order
from tasks.sources import SOURCES
from tasks.text_encoder import load_text_encoder
from tasks.texts import read_text_input
from tasks.vision_encoder import load_vision_encoder
from tasks.weights import Backbone
from tasks.writing import write_images, write_texts

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class Classification(Task):
    """One of several classes for each example; texts and images differ in reading and encoding."""

    name: str
    column: str
    summary: str
    reader: Callable[[Path, Columns], Table]
    writer: Callable[[datasets.Dataset, Path, Columns], None]
    convert: Callable[[Any], Any]
    load_encoder: Callable[[Backbone, BackboneSection, int], Encoder]
    augmentations: tuple[str, ...]
    has_channels: bool
    head_loss: Literal["softmax"] = "softmax"

    def check(self, job: Job) -> None:
        for name in job.train.augment:
            if name not in self.augmentations:
                known = ", ".join(map(repr, self.augmentations))
                raise ConfigError(f"train.augment: expected {known} for {self.name}, found {name!r}")
        if job.backbone.channels_last and not self.has_channels:
            raise ConfigError(
                f"backbone.channels_last: expected false for {self.name}, found true: texts have no channels"
            )

        if job.privacy.units and job.data.classes is None and job.data.source not in SOURCES:
            raise ConfigError(
                "data.classes: missing, expected the list of classes with"
                f" privacy.unit = {job.privacy.unit!r}: one made from the data would tell what clients hold"
            )

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        return self.reader(source, _columns(data))

    def adopt(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return table_of(splits)

    def write(self, dataset: datasets.Dataset, folder: Path, data: DataSection) -> None:
        self.writer(dataset, folder, _columns(data))

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        return inspect(source, self.name, _columns(data))

    def keys(self, dataset: datasets.Dataset) -> list[bytes]:
        return example_keys(dataset)

    def describe(self, dataset: datasets.Dataset, data: DataSection, options: Options) -> Facts:
        """The classes, in order: those the job names, or else those of the data, sorted.

        Raises:
            DataError: the data has a class that the job doesn't name.
        """
        present = set(dataset["label"])
        if data.classes is None:
            return {"classes": sorted(present)}
        unknown = sorted(present - set(data.classes))
        if unknown:
            raise DataError(f"label {unknown[0]!r} is not in data.classes = {list(data.classes)}")
        return {"classes": list(data.classes), "pinned": True}

    def agree(self, facts: Sequence[Facts]) -> Facts:
        """Pinned classes as they are, else the sorted union.

        Raises:
            ConfigError: there are fewer than two classes.
        """
        pinned = next((f for f in facts if f.get("pinned")), None)
        classes = pinned["classes"] if pinned else sorted({c for f in facts for c in f["classes"]})
        if len(classes) < 2:
            raise ConfigError(f"classification needs at least two classes, found {classes}")
        return {"classes": classes}

    def shard(self, dataset: datasets.Dataset, facts: Facts, keys: Sequence[bytes] | None = None) -> Shard:
        keys = example_keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        index = {name: i for i, name in enumerate(facts["classes"])}
        labels = dataset["label"][:]
        try:
            targets = torch.tensor([index[labels[row]] for row in order], dtype=torch.int64)
        except KeyError as unknown:
            raise DataError(f"label {unknown} is not one of the run's classes {facts['classes']}") from None
        inputs = Picked(Cells(dataset, self.column, self.convert), tuple(order))
        return Shard(inputs, targets, tuple(keys[row] for row in order))

    def raw_input(self, given: str) -> Any:
        """The bytes of an image file; a text file's text, or the text itself.

        Raises:
            DataError: it can't be read, or isn't of this task.
        """
        return read_image_input(given) if self.column == "image" else read_text_input(given)

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        return self.load_encoder(backbone, section, seed)

    def head(self, width: int, facts: Facts) -> nn.Module:
        return nn.Linear(width, len(facts["classes"]))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, facts: Facts) -> MetricCollection:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        count = len(facts["classes"])
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "macro_f1": MulticlassF1Score(count, average="macro"),
            },
            compute_groups=False,
        )

    def answer(self, predictions: torch.Tensor, facts: Facts) -> list[dict[str, Any]]:
        """The most likely class and its probability, and all probabilities."""
        rows = []
        for row in torch.softmax(predictions, dim=-1):
            best = int(row.argmax())
            probabilities = {c: round(float(p), 4) for c, p in zip(facts["classes"], row, strict=True)}
            rows.append(
                {"label": facts["classes"][best], "probability": float(row[best]), "all": probabilities}
            )
        return rows


def _columns(data: DataSection) -> Columns:
    return Columns(text=data.text, image=data.image, label=data.label)


def _same(value: Any) -> Any:
    return value


TEXT_CLASSIFICATION = Classification(
    name="text-classification",
    column="text",
    summary="one label for a text; any transformers encoder; accuracy, macro F1",
    reader=read_texts,
    writer=write_texts,
    convert=_same,
    load_encoder=load_text_encoder,
    augmentations=TEXT_AUGMENTATIONS,
    has_channels=False,
)

IMAGE_CLASSIFICATION = Classification(
    name="image-classification",
    column="image",
    summary="one label for an image; any torchvision or transformers vision model; accuracy, macro F1",
    reader=read_images,
    writer=write_images,
    convert=image_bytes,
    load_encoder=load_vision_encoder,
    augmentations=IMAGE_AUGMENTATIONS,
    has_channels=True,
)
