"""The encoders around backbones that extensions bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from atoll.backbones.brought.augmentations import augmented_sound, augmented_text
from atoll.backbones.brought.loading import check_rows, loaded_as
from atoll.backbones.brought.modules import ImageBackbone, SoundBackbone, TextBackbone
from atoll.backbones.dense_vision import calibrate_batch_norm, varied_noise
from atoll.backbones.encoder import Batch, Encoder, FixedShapeEncoder, Preprocessed, Variation
from atoll.backbones.resolve import Backbone
from atoll.backbones.vision import VisionEncoder
from atoll.data.audio import RATE, checked_sound
from atoll.errors import ConfigError
from atoll.job.job import BackboneSection
from atoll.plugins import BACKBONE_PREFIX, Extension, failure_of, in_one_line
from atoll.protocol.random_streams import stream

INPUT = "input"
"""What a batch calls the tensors of a backbone that takes one of them."""

PROBES = ("a first text", "Another, which is longer: 1, 2, 3.", "x", "The fourth\nhas two lines.")


def brought_image_encoder(backbone: Backbone, section: BackboneSection, seed: int) -> VisionEncoder:
    """An extension's module for images, in eval mode; its rows of features have been seen to be apart.

    Raises:
        ConfigError, WeightsError: it can't be built, or isn't what such a module is.
    """
    name = f"{BACKBONE_PREFIX}{backbone.name}"
    network = loaded_as(ImageBackbone, name, backbone.options, seed, backbone.weights)
    assert isinstance(network, ImageBackbone)
    size = section.image_size or network.image_size
    encoder = VisionEncoder(
        network, size, network.mean, network.std, network.width, channels_last=section.channels_last
    )
    draw = stream(0, "probe")
    noise = [torch.randint(256, (3, size, size), generator=draw, dtype=torch.uint8) for _ in range(4)]
    check_rows(name, encoder, encoder.collate(noise), network.width)
    if section.weights == "random" and any(isinstance(m, nn.BatchNorm2d) for m in network.modules()):
        calibrate_batch_norm(network, size, seed, draw=varied_noise)
    return encoder


def brought_text_encoder(backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
    """As `brought_image_encoder`, for texts.

    Raises:
        ConfigError, WeightsError: as there, or the job says how texts are cut or pooled.
    """
    name = f"{BACKBONE_PREFIX}{backbone.name}"
    for key in ("max_tokens", "pool"):
        if section.is_given(key) and section.name == name:
            raise ConfigError(
                f"backbone.{key}: {name} prepares texts itself, expected none,"
                f" found {getattr(section, key)!r}"
            )
    network = loaded_as(TextBackbone, name, backbone.options, seed, backbone.weights)
    assert isinstance(network, TextBackbone)
    encoder = PreparedTexts(network, name)
    check_rows(name, encoder, encoder.collate(encoder.preprocess(PROBES)), network.width)
    return encoder


def brought_sound_encoder(
    backbone: Backbone, section: BackboneSection, seed: int, max_seconds: float
) -> PreparedSounds:
    """As `brought_image_encoder`, for recordings of at most `max_seconds`.

    Raises:
        ConfigError, WeightsError: as there.
    """
    name = f"{BACKBONE_PREFIX}{backbone.name}"
    network = loaded_as(SoundBackbone, name, backbone.options, seed, backbone.weights)
    assert isinstance(network, SoundBackbone)
    encoder = PreparedSounds(network, name, max_seconds)
    draw = stream(0, "probe")
    most = int(max_seconds * RATE)
    sounds = [torch.rand(max(1, int(most * part)), generator=draw) - 0.5 for part in (1, 0.3, 0.7, 0.1)]
    check_rows(name, encoder, encoder.collate([encoder.ready(one) for one in sounds]), network.width)
    return encoder


class PreparedInputs(FixedShapeEncoder):
    """Inputs, as an extension's module prepares them one by one, to features [batch, width]."""

    inputs_are: ClassVar[str]

    def __init__(self, network: TextBackbone | SoundBackbone, name: str) -> None:
        super().__init__()
        self.model: Any = network
        self.width = network.width
        self._name = name

    def forward(self, batch: Batch) -> torch.Tensor:
        """Features [batch, width]."""
        single = batch.keys() == {INPUT}
        features: torch.Tensor = self.model(batch[INPUT]) if single else self.model(**batch)
        return features

    def ready(self, value: Any) -> Batch:
        """What `prepare` returns for one input, as tensors by name.

        Raises:
            ConfigError: it raises an error, or returns something else.
        """
        results: list[Preprocessed] = []
        failure = failure_of(lambda: results.append(self._prepare(value)))
        if failure is not None:
            raise ConfigError(
                f"backbone.name: {self._name}.prepare raised {in_one_line(failure)}"
            ) from failure
        prepared = results[0]
        named = {INPUT: prepared} if isinstance(prepared, torch.Tensor) else prepared
        if not isinstance(named, dict) or not named or not all(map(torch.is_tensor, named.values())):
            raise ConfigError(
                f"backbone.name: {self._name}.prepare: expected a tensor or a dictionary of tensors,"
                f" found {type(prepared).__name__}"
            )
        return named

    def preprocess(self, inputs: Sequence[Any]) -> list[Batch]:
        return [self.ready(self._value(one)) for one in inputs]

    def prepared(self, inputs: Sequence[Any], places: Sequence[int], variation: Variation | None) -> Batch:
        values = [self._value(one) for one in inputs]
        if variation is not None:
            pairs = zip(values, places, strict=True)
            values = [
                self._varied(value, variation.brought, variation.stream(place)) for value, place in pairs
            ]
        return self.collate([self.ready(value) for value in values])

    def _value(self, one: Any) -> Any:
        """What augmentations and `prepare` take of an input."""
        return one

    def _varied(self, value: Any, augmentations: Sequence[Extension], draw: torch.Generator) -> Any:
        """The value after these augmentations."""
        raise NotImplementedError

    def _prepare(self, value: Any) -> Preprocessed:
        prepared: Preprocessed = self.model.prepare(value)
        return prepared

    def collate(self, ready: Sequence[Batch]) -> Batch:
        """Stacked to [batch, …].

        Raises:
            ConfigError: they aren't of one form.
        """
        forms = {tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(one.items())) for one in ready}
        if len(forms) > 1:
            one, other = (
                [(name, list(shape)) for name, shape, _ in form] for form in sorted(forms, key=str)[:2]
            )
            raise ConfigError(
                f"backbone.name: {self._name}.prepare: expected tensors of one shape and type for all"
                f" {self.inputs_are}, found {one} and {other}"
            )
        return {name: torch.stack([one[name] for one in ready]) for name in ready[0]}


class PreparedTexts(PreparedInputs):
    """Texts, as an extension's module prepares them."""

    inputs_are = "texts"

    def _varied(self, value: str, augmentations: Sequence[Extension], draw: torch.Generator) -> str:
        return augmented_text(value, augmentations, draw)


class PreparedSounds(PreparedInputs):
    """Recordings, as bytes of files, as an extension's module prepares their samples."""

    inputs_are = "recordings"

    def __init__(self, network: SoundBackbone, name: str, max_seconds: float) -> None:
        super().__init__(network, name)
        self._max_seconds = max_seconds

    def _value(self, one: bytes) -> torch.Tensor:
        return torch.from_numpy(checked_sound(one, "audio", self._max_seconds))

    def _varied(
        self, value: torch.Tensor, augmentations: Sequence[Extension], draw: torch.Generator
    ) -> torch.Tensor:
        return augmented_sound(value, augmentations, draw)

    def _prepare(self, value: torch.Tensor) -> Preprocessed:
        prepared: Preprocessed = self.model.prepare(value, self._max_seconds)
        return prepared
