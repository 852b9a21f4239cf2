"""The base class of tasks with a head on a text's features: reading, encoding and prediction inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from atoll.backbones.brought.names import TEXT_AUGMENTATIONS
from atoll.backbones.encoder import Encoder
from atoll.backbones.options import check_augment, check_backbone_options
from atoll.backbones.resolve import Backbone
from atoll.backbones.text import load_text_encoder
from atoll.data.dataset import Dataset
from atoll.data.lazy import LazyColumn, LazyRows
from atoll.data.parsers import text_cell
from atoll.data.schema import SchemaField
from atoll.data.shard import Shard, canonical_order
from atoll.data.texts import read_text_input
from atoll.errors import ConfigError
from atoll.job.job import BackboneSection, Job
from atoll.protocol.messages import DataInfo
from atoll.tasks.schema_task import SchemaTask

TEXT = SchemaField(
    "text",
    text_cell,
    pa.string(),
    ("sentence", "content", "review", "document", "body", "message", "article"),
)


class TextFeatures(SchemaTask):
    """A task with a head on the features of a text encoder."""

    name: str

    def check(self, job: Job) -> None:
        self.records(job.task.options).check(job.data)
        check_augment(job, TEXT_AUGMENTATIONS)
        if job.backbone.channels_last:
            raise ConfigError(
                f"backbone.channels_last: expected false for {self.name}, found true: texts have no channels"
            )
        check_backbone_options(job)

    def targets(self, dataset: Dataset, order: Sequence[int], data_info: DataInfo) -> torch.Tensor:
        """The targets of the rows in the given order, [n, outputs]."""
        raise NotImplementedError

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        inputs = LazyRows(texts_of(dataset), tuple(order))
        return Shard(inputs, self.targets(dataset, order, data_info), tuple(keys[row] for row in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return (".txt",)

    def parse_input(self, text: str) -> Any:
        """The content of a text file, or `text` itself.

        Raises:
            DataError: the file can't be read, or the text is empty.
        """
        return read_text_input(text)

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        return load_text_encoder(backbone, section, seed)


def texts_of(dataset: Any) -> LazyColumn:
    """The texts of a data set's rows, read lazily."""
    return LazyColumn(dataset, "text", str)
