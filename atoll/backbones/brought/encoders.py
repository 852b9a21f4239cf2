"""The encoders around backbones that extensions bring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from atoll.backbones.brought.augmentations import augmented_text
from atoll.backbones.brought.loading import check_rows, loaded_as
from atoll.backbones.brought.modules import ImageBackbone, TextBackbone
from atoll.backbones.dense_vision import calibrate_batch_norm, varied_noise
from atoll.backbones.encoder import Batch, Encoder, FixedShapeEncoder, Preprocessed, Variation
from atoll.backbones.resolve import Backbone
from atoll.backbones.vision import VisionEncoder
from atoll.errors import ConfigError
from atoll.job.job import BackboneSection
from atoll.plugins import BACKBONE_PREFIX, failure_of, in_one_line
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


class PreparedTexts(FixedShapeEncoder):
    """Texts, as an extension's module prepares them, to features [batch, width]."""

    model: TextBackbone

    def __init__(self, network: TextBackbone, name: str) -> None:
        super().__init__()
        self.model = network
        self.width = network.width
        self._name = name

    def forward(self, batch: Batch) -> torch.Tensor:
        """Features [batch, width]."""
        single = batch.keys() == {INPUT}
        features: torch.Tensor = self.model(batch[INPUT]) if single else self.model(**batch)
        return features

    def preprocess(self, inputs: Sequence[str]) -> list[Batch]:
        """What `prepare` returns for each, as tensors by name.

        Raises:
            ConfigError: it raises an error, or returns something else.
        """
        preprocessed: list[Preprocessed] = []
        for text in inputs:
            failure = failure_of(lambda text=text: preprocessed.append(self.model.prepare(text)))  # type: ignore[misc]
            if failure is not None:
                raise ConfigError(
                    f"backbone.name: {self._name}.prepare raised {in_one_line(failure)}"
                ) from failure
        return [self._named(one) for one in preprocessed]

    def _named(self, prepared: Preprocessed) -> Batch:
        named = {INPUT: prepared} if isinstance(prepared, torch.Tensor) else prepared
        if not isinstance(named, dict) or not named or not all(map(torch.is_tensor, named.values())):
            raise ConfigError(
                f"backbone.name: {self._name}.prepare: expected a tensor or a dictionary of tensors,"
                f" found {type(prepared).__name__}"
            )
        return named

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
                f"backbone.name: {self._name}.prepare: expected tensors of one shape and type for all texts,"
                f" found {one} and {other}"
            )
        return {name: torch.stack([one[name] for one in ready]) for name in ready[0]}

    def prepared(self, inputs: Sequence[str], places: Sequence[int], variation: Variation | None) -> Batch:
        if variation is not None:
            pairs = zip(inputs, places, strict=True)
            drawn = ((text, variation.stream(place)) for text, place in pairs)
            inputs = [augmented_text(text, variation.brought, draw) for text, draw in drawn]
        return self.collate(self.preprocess(inputs))
