"""Any torchvision classification model, or transformers vision model, as features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from atoll.backbones.augmentation import framed, varied_image
from atoll.backbones.brought.augmentations import augmented_image
from atoll.backbones.checkpoint import load_state_dict_strict, load_transformer, load_weights
from atoll.backbones.dense_vision import calibrate_batch_norm, varied_noise
from atoll.backbones.encoder import PIXELS, Batch, FixedInput, FixedShapeEncoder, Variation, in_layout
from atoll.backbones.resolve import LENET, SCATTERING, Backbone
from atoll.backbones.scattering.transform import Scattering
from atoll.backbones.small_vision import LENET_WIDTH, lenet
from atoll.backbones.torchvision_models import has_batch_norm, torchvision_names
from atoll.data.images import decode_image, eight_bits, scaled
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection
from atoll.protocol.random_streams import global_stream

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


RAW_SIZE = 28
"""Of images without a trained network, where the job names no other."""


class UnitPixels(nn.Module):
    """No network: the pixels themselves, scaled to length 1 (a black image stays zero)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[batch, 3, s, s] to [batch, 3 s s]."""
        return nn.functional.normalize(pixels.flatten(1), dim=1)


class VisionEncoder(FixedShapeEncoder):
    """Encoded images to features [batch, width]."""

    def __init__(
        self, trunk: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], width: int,
        *, channels_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = trunk.to(memory_format=self._layout) if channels_last else trunk
        self.width = width
        self.size = size
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    @property
    def fixed_input(self) -> FixedInput:
        return FixedInput(PIXELS, (3, self.size, self.size), self._layout)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Features before the network's own classifier, [batch, width]."""
        output = self.model(in_layout(batch[PIXELS], self._layout))
        if isinstance(output, torch.Tensor):
            return output.flatten(1)
        pooled = getattr(output, "pooler_output", None)
        features: torch.Tensor = output.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)
        return features

    def preprocess(self, inputs: Sequence[bytes]) -> list[torch.Tensor]:
        """The squares as 8-bit pixels [3, s, s]: a quarter of the memory of what the network takes."""
        return [self._pixels(data, place, None) for place, data in enumerate(inputs)]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        """Scaled to ImageNet's mean and deviation, or to the network's own."""
        return {PIXELS: scaled(ready, self._mean, self._std)}

    def prepared(self, inputs: Sequence[bytes], places: Sequence[int], variation: Variation | None) -> Batch:
        pairs = zip(inputs, places, strict=True)
        return self.collate([self._pixels(data, place, variation) for data, place in pairs])

    def _pixels(self, data: bytes, place: int, variation: Variation | None) -> torch.Tensor:
        """A square of the image in 8 bits: [3, s, s]."""
        image = decode_image(data, "image", verify=False)  # who read it has seen to that
        if variation is None:
            image = framed(image, self.size)
        else:
            draw = variation.stream(place)
            image = varied_image(image, self.size, variation.names, draw)
            image = augmented_image(image, variation.brought, draw)
        return eight_bits(image)


def load_vision_encoder(backbone: Backbone, section: BackboneSection, seed: int) -> VisionEncoder:
    """Build the network in eval mode with the resolved weights, its own classifier cut off."""
    if backbone.kind == "hf":
        return _transformers_encoder(backbone, section, seed)
    if backbone.kind == "plugin":
        from atoll.backbones.brought.encoders import brought_image_encoder  # which is made of this file's

        return brought_image_encoder(backbone, section, seed)
    if backbone.kind == "raw":
        side = section.image_size or RAW_SIZE
        return VisionEncoder(UnitPixels(), side, (0.0,) * 3, (1.0,) * 3, 3 * side * side)
    if (backbone.kind, backbone.name) == ("atoll", SCATTERING):
        transform = Scattering(section.image_size or RAW_SIZE).eval()
        return VisionEncoder(transform, transform.side, (0.0,) * 3, (1.0,) * 3, transform.width)
    if (backbone.kind, backbone.name) == ("atoll", LENET):
        return _lenet_encoder(backbone, section, seed)
    trunk, width = torchvision_trunk(backbone.name, seed)
    size = section.image_size or _native_size(backbone.name)
    if backbone.weights is not None:
        state = load_weights(backbone.weights)
        load_state_dict_strict(trunk, _fitting(state, trunk), backbone.weights)
    elif has_batch_norm(backbone.name):
        _calibrate(trunk.eval(), backbone.name, size, seed)
    layout = section.channels_last
    return VisionEncoder(trunk.eval(), size, IMAGENET_MEAN, IMAGENET_STD, width, channels_last=layout)


def _lenet_encoder(backbone: Backbone, section: BackboneSection, seed: int) -> VisionEncoder:
    side = section.image_size or RAW_SIZE
    network = lenet(side, seed)
    if backbone.weights is not None:
        load_state_dict_strict(network, load_weights(backbone.weights), backbone.weights)
    layout = section.channels_last
    return VisionEncoder(network.eval(), side, (0.0,) * 3, (1.0,) * 3, LENET_WIDTH, channels_last=layout)


def _calibrate(trunk: nn.Module, name: str, size: int, seed: int) -> None:
    """Settle a random network's batch norms, if it has some.

    Raises:
        ConfigError: pictures of that size are too small for it.
    """
    try:
        calibrate_batch_norm(trunk, size, seed, draw=varied_noise)
    except (RuntimeError, ValueError):
        raise ConfigError(
            f"backbone.image_size: torchvision:{name} makes nothing of pictures of {size} x {size},"
            f" expected a larger size (its own is {_native_size(name)})"
        ) from None


def torchvision_trunk(name: str, seed: int) -> tuple[nn.Module, int]:
    """(a torchvision network without its last layer, width of its features).

    Raises:
        WeightsError: it isn't one for whole images.
    """
    from torchvision import models

    if name not in torchvision_names():
        raise WeightsError(f"backbone.name: torchvision:{name} is no classification model, expected one")

    with global_stream(seed, "init", "backbone"):
        options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        network: nn.Module = models.get_model(name, weights=None, **options)
    for auxiliary in ("aux1", "aux2", "AuxLogits"):
        if hasattr(network, auxiliary):
            setattr(network, auxiliary, None)
    if hasattr(network, "aux_logits"):
        network.aux_logits = False  # type: ignore[assignment]
    if hasattr(network, "transform_input"):
        network.transform_input = True  # type: ignore[assignment]  # what their weights were trained with
    return network, _cut_classifier(network)


def torchvision_width(name: str) -> int:
    """Width of a torchvision network's features, without its weights where it can be told so."""
    try:
        with torch.device("meta"):
            return torchvision_trunk(name, 0)[1]
    except NotImplementedError:  # some compute their initial values on the way
        return torchvision_trunk(name, 0)[1]


def _cut_classifier(network: nn.Module) -> int:
    """Replace the last linear layer (or, in SqueezeNet, convolution) by nothing; its input width."""
    last_linear = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)][-1:]
    last = last_linear or [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)][-1:]
    parent_name, _, child = last[0].rpartition(".")
    layer: Any = network.get_submodule(last[0])
    setattr(network.get_submodule(parent_name), child, nn.Identity())
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def _fitting(state: dict[str, torch.Tensor], trunk: nn.Module) -> dict[str, torch.Tensor]:
    """Without the classifier that was cut off; anything else unexpected stays and is an error."""
    expected = set(trunk.state_dict())
    modules = {name for name, module in trunk.named_modules() if isinstance(module, nn.Identity)}
    gone = (*tuple(f"{m}." for m in modules), "aux1.", "aux2.", "AuxLogits.")
    return {n: t for n, t in state.items() if n in expected or not n.startswith(gone)}


def _native_size(name: str) -> int:
    """The size of the images the published weights were measured at."""
    from torchvision import models

    crop = models.get_model_weights(name).DEFAULT.transforms().crop_size
    return int(crop[0] if isinstance(crop, list | tuple) else crop)


def _transformers_encoder(backbone: Backbone, section: BackboneSection, seed: int) -> VisionEncoder:

    network = load_transformer(backbone, seed)
    network = getattr(network, "vision_model", network)
    width = getattr(network.config, "hidden_size", None) or (network.config.hidden_sizes or [0])[-1]
    if not width or not hasattr(network.config, "num_channels"):
        raise WeightsError(
            f"backbone.name: {section.name} is not a vision model, found {network.config.model_type}"
        )
    mean, std = normalisation_of(backbone)
    size = section.image_size or getattr(network.config, "image_size", None) or 224
    return VisionEncoder(network, int(size), mean, std, int(width), channels_last=section.channels_last)


def normalisation_of(backbone: Backbone) -> tuple[list[float], list[float]]:
    """(mean, deviation) of each colour that a folder's network expects pictures to be scaled by.

    Raises:
        WeightsError: the folder doesn't say.
    """
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(str(backbone.folder), local_files_only=True)
    except OSError:
        raise WeightsError(f"{backbone.folder}: has no preprocessor_config.json, expected one") from None
    return list(processor.image_mean), list(processor.image_std)
