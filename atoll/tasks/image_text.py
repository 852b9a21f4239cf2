"""Classification of images with texts: two encoders, frozen or tuned, and one head on both features.

The image encoder is the job's backbone, the text encoder is `backbone.options.text`; a backbone such as CLIP
provides both, and then there is no such option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from atoll.backbones.brought.names import is_brought
from atoll.backbones.checkpoint import load_transformer
from atoll.backbones.encoder import Batch, Encoder, FixedBatch, Preprocessed, Variation
from atoll.backbones.options import options_of, refuse_augment, refuse_options
from atoll.backbones.resolve import Backbone
from atoll.backbones.text import TextEncoder, load_text_encoder, load_tokenizer
from atoll.backbones.vision import VisionEncoder, load_vision_encoder
from atoll.data.dataset import Dataset
from atoll.data.images import Depth, decode_image, image_bytes, read_image_input
from atoll.data.labels import class_name
from atoll.data.lazy import LazyRows
from atoll.data.parsers import text_cell
from atoll.data.schema import Schema, SchemaField, picture_field
from atoll.data.shard import Shard, canonical_order
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.job.section import Options, Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.classes import Labelled
from atoll.tasks.schema_task import SchemaTask

Pair = tuple[bytes, str]


class PairOptions(Section):
    """`backbone.options` of image-text: the name of the text encoder, in the form of a backbone's name."""

    text: str | None = None


def _image(data: bytes, where: str) -> None:
    decode_image(data, where)


RECORDS = Schema(
    (
        picture_field(_image),
        SchemaField(
            "text", text_cell, pa.string(), ("sentence", "content", "caption", "review", "description")
        ),
        SchemaField("label", class_name, pa.string(), ("class", "category", "target", "y")),
    ),
    count_by="label",
)


class PairEncoder(Encoder):
    """Encodes (image, text) pairs: both features concatenated, each normalised to unit variance."""

    def __init__(self, image: VisionEncoder, text: Encoder) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"image": image.model, "text": text.model})
        self.width = image.width + text.width
        # In a tuple, so that torch doesn't register their networks a second time.
        self._parts = (image, text)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The features, [batch, image width + text width]."""
        text_batch = {name: t for name, t in batch.items() if name != "pixel_values"}
        image, text = self._parts
        states = (image({"pixel_values": batch["pixel_values"]}), text(text_batch))
        return torch.cat([nn.functional.layer_norm(f, f.shape[1:]) for f in states], dim=1)

    def preprocess(self, inputs: Sequence[Pair]) -> list[Batch]:
        image, text = self._parts
        pixels, tokens = image.preprocess([i for i, _ in inputs]), text.preprocess([t for _, t in inputs])
        return [{"pixels": p} | _named(w) for p, w in zip(pixels, tokens, strict=True)]

    def collate(self, ready: Sequence[Batch]) -> Batch:
        image, text = self._parts
        return image.collate([one["pixels"] for one in ready]) | text.collate(
            [_text_of(one) for one in ready]
        )

    def fixed_batches(
        self, inputs: Sequence[Pair], size: int, variation: Variation | None = None
    ) -> Iterator[FixedBatch]:
        """Batches of `size` as the text encoder forms them, by length of text."""
        for rows, text_batch in self._parts[1].fixed_batches([text for _, text in inputs], size):
            yield rows, partial(self._filled, [inputs[row][0] for row in rows], text_batch, size)

    def _filled(self, images: Sequence[bytes], texts: Callable[[], Batch], size: int) -> Batch:
        image, batch = self._parts[0], texts()
        pixels = image.preprocess(images)
        return image.collate(pixels + pixels[-1:] * (size - len(pixels))) | batch


WORDS = "words"
"""The name of a pair's preprocessed text; a prefix, with a dot, if the text has several tensors."""


def _named(preprocessed: Preprocessed) -> Batch:
    """A preprocessed text as a batch whose names don't clash with the image's."""
    if isinstance(preprocessed, torch.Tensor):
        return {WORDS: preprocessed}
    return {f"{WORDS}.{name}": tensor for name, tensor in preprocessed.items()}


def _text_of(pair: Batch) -> Preprocessed:
    """The preprocessed text of a pair: the inverse of `_named`."""
    if WORDS in pair:
        return pair[WORDS]
    return {name.removeprefix(f"{WORDS}."): tensor for name, tensor in pair.items() if name != "pixels"}


def load_pair_encoder(backbone: Backbone, section: BackboneSection, seed: int) -> PairEncoder:
    """Both encoders with the weights of the resolved backbone, in eval mode.

    Raises:
        WeightsError: the backbone doesn't read images, or there is no encoder of texts.
    """
    image = load_vision_encoder(backbone, section, seed)
    if backbone.also is None and backbone.kind == "hf":
        network = load_transformer(backbone, seed)
        if hasattr(network, "text_model"):
            tokenizer = load_tokenizer(Path(str(backbone.folder)))
            return PairEncoder(image, TextEncoder(network.text_model, tokenizer, section))
    if backbone.also is None:
        raise WeightsError(
            f"backbone.options.text: missing, expected an encoder of texts beside {section.name},"
            ' such as "hf:all-MiniLM-L6-v2"'
        )
    return PairEncoder(image, load_text_encoder(backbone.also, section, seed))


@dataclass(frozen=True)
class ImageText(SchemaTask, Labelled):
    """Classification of images, each with a text."""

    name: str = "image-text"
    summary: str = "one label for an image with its text; two encoders, or CLIP; accuracy, macro F1"
    reads_pictures: bool = True
    depth: Depth | None = None

    def configured(self, job: Job, backbone: Backbone) -> ImageText:
        return replace(self, depth=Depth.of(job.data))

    def check(self, job: Job) -> None:
        refuse_options(job.task.options, "task.options", self.name)
        if not is_brought(job.backbone):  # whose options are its own, but for `text`
            options_of(job.backbone.options, PairOptions, "backbone.options")
        refuse_augment(job)
        if job.tune.method == "last-k":
            raise ConfigError(
                "tune.method: image-text has two networks and no last block of both,"
                " expected 'head', 'lora' or 'full', found 'last-k'"
            )

    def records(self, options: Options) -> Schema:
        return RECORDS

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        targets = self.targets(dataset["label"][:], order, data_info)

        def pair(row: int) -> Pair:
            cells = dataset[row]
            return image_bytes(cells["image"]), cells["text"]

        return Shard(LazyRows(pair, tuple(order)), targets, tuple(keys[row] for row in order))

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        return load_pair_encoder(backbone, section, seed)

    def parse_input(self, line: str) -> Any:
        """(the image's bytes, its text) of an input such as `photo.jpg::a red car`.

        Raises:
            DataError: the image or the text is missing, or the image can't be read.
        """
        path, colons, text = line.partition("::")
        if not colons or not text.strip():
            raise DataError(
                f"input {line!r}: expected an image and its text, such as photo.jpg::'what it is'"
            )
        return read_image_input(path, self.depth), text


IMAGE_TEXT = ImageText()
