"""Text and image classification: a linear head on a backbone's features, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.backbones.brought.names import IMAGE_AUGMENTATIONS, TEXT_AUGMENTATIONS
from atoll.backbones.encoder import Encoder
from atoll.backbones.options import check_augment, check_backbone_options, refuse_options
from atoll.backbones.resolve import Backbone
from atoll.backbones.text import load_text_encoder
from atoll.backbones.vision import load_vision_encoder
from atoll.data.classification import (
    Findings,
    Table,
    example_keys,
    inspect,
    read_images,
    read_texts,
    table_of,
)
from atoll.data.columns import Columns
from atoll.data.dataset import Dataset
from atoll.data.images import IMAGE_SUFFIXES, Depth, image_bytes, read_image_input
from atoll.data.lazy import LazyColumn, LazyRows
from atoll.data.shard import Shard, canonical_order
from atoll.data.texts import read_text_input
from atoll.data.writers import write_images, write_texts
from atoll.errors import ConfigError
from atoll.job.job import BackboneSection, DataSection, Job
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.tasks.classes import Labelled

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Classification(Labelled):
    """Classification of texts or images, which differ only in how they are read and encoded."""

    name: str
    column: str
    summary: str
    reader: Callable[[Path, Columns], Table]
    writer: Callable[[Dataset, Path, Columns], None]
    convert: Callable[[Any], Any]
    load_encoder: Callable[[Backbone, BackboneSection, int], Encoder]
    augmentations: tuple[str, ...]
    has_channels: bool
    reads_pictures: bool = False
    depth: Depth | None = None

    def configured(self, job: Job, backbone: Backbone) -> Classification:
        return replace(self, depth=Depth.of(job.data))

    def check(self, job: Job) -> None:
        check_augment(job, self.augmentations)
        if job.backbone.channels_last and not self.has_channels:
            raise ConfigError(
                f"backbone.channels_last: expected false for {self.name}, found true: texts have no channels"
            )

        refuse_options(job.task.options, "task.options", self.name)
        check_backbone_options(job)

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        return self.reader(source, _columns(data))

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return table_of(splits)

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        self.writer(dataset, folder, _columns(data))

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        return inspect(source, self.name, _columns(data))

    def keys(self, dataset: Dataset) -> list[bytes]:
        return example_keys(dataset)

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = example_keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        targets = self.targets(dataset["label"][:], order, data_info)
        inputs = LazyRows(LazyColumn(dataset, self.column, self.convert), tuple(order))
        return Shard(inputs, targets, tuple(keys[row] for row in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return IMAGE_SUFFIXES if self.column == "image" else (".txt",)

    def parse_input(self, text: str) -> Any:
        """The bytes of an image file; for texts, the content of a text file, or `text` itself.

        Raises:
            DataError: the input can't be read, or isn't of this task's kind.
        """
        return read_image_input(text, self.depth) if self.column == "image" else read_text_input(text)

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        return self.load_encoder(backbone, section, seed)


def _columns(data: DataSection) -> Columns:
    return Columns(text=data.text, image=data.image, label=data.label, depth=Depth.of(data))


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
    reads_pictures=True,
)
