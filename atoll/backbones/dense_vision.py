"""Whole pictures as squares, for tasks that say where things are: pixels and places keep their relation.

Unlike for classification nothing is cut off: both sides are resized to the one size, and so are masks and
boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_weights
from atoll.backbones.encoder import Batch, Encoder
from atoll.backbones.options import refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.backbones.torchvision_models import TorchvisionKind, torchvision_names
from atoll.data.images import decode_image, eight_bits, scaled
from atoll.data.schema import file_bytes
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.protocol.random_streams import global_stream

SIZE = 128
"""Of a picture's sides, where the job names no other."""

_TURNED = range(5, 9)
"""EXIF orientations that swap width and height."""


class PictureEncoder(Encoder):
    """A network that looks at whole pictures, and has its own head inside."""

    def __init__(self, model: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.width = 0
        self._size = size
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    def preprocess(self, inputs: Sequence[bytes]) -> list[torch.Tensor]:
        """8-bit pixels [3, s, s] of the whole picture."""
        return [self._pixels(data) for data in inputs]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        return {"pixel_values": scaled(ready, self._mean, self._std)}

    def _pixels(self, data: bytes) -> torch.Tensor:
        image = decode_image(data, "image", verify=False)  # who read it has seen to that
        return eight_bits(image.resize((self._size, self._size), Image.Resampling.BILINEAR))


def size_of(job: Job) -> int:
    """The side of the square that pictures become."""
    return job.backbone.image_size or SIZE


def picture_size(cell: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) of an encoded picture, upright; its pixels aren't decoded."""
    with Image.open(BytesIO(file_bytes(cell, "image"))) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112) in _TURNED
    return (height, width) if turned else (width, height)


def refuse_variation(job: Job, task: str) -> None:
    """Raises ConfigError where inputs would vary without what they are labelled with."""
    refuse_augment(job)
    if job.backbone.channels_last:
        raise ConfigError(f"backbone.channels_last: expected false for {task}, found true")
    if job.tune.hidden is not None:
        raise ConfigError(f"tune.hidden: {task} has its head inside the network, expected none")


def without_other_parts(splits: Mapping[str, pa.Table], parts: Sequence[str]) -> dict[str, pa.Table]:
    """A built-in source's splits without what is of other tasks: plain columns and these parts stay."""
    return {
        split: table.select(
            [f.name for f in table.schema if f.name in parts or not pa.types.is_nested(f.type)]
        )
        for split, table in splits.items()
    }


def of_torchvision(
    section: BackboneSection, backbone: Backbone, kind: TorchvisionKind, classes: int, own: str
) -> nn.Module:
    """torchvision's network of that kind with first values, none of them pretrained.

    Raises:
        WeightsError: it is no model of that kind; `own` names the small one of ours.
    """
    from torchvision import models

    known = torchvision_names(kind)
    if backbone.kind != "torchvision" or backbone.name not in known:
        expected = ", ".join((f"atoll:{own}", *(f"torchvision:{name}" for name in known)))
        raise WeightsError(f"backbone.name: {section.name} is no {kind} model, expected one of {expected}")
    network: nn.Module = models.get_model(
        backbone.name, weights=None, weights_backbone=None, num_classes=classes
    )
    return network


def fill_all_but_classes(network: nn.Module, head: str, backbone: Backbone) -> None:
    """Load weights; what the head has in another shape, being of other classes, stays fresh.

    Raises:
        WeightsError: they are of another network.
    """
    assert backbone.weights is not None
    own, given = network.state_dict(), load_weights(backbone.weights)
    for name, tensor in own.items():
        if name.startswith(f"{head}.") and (name not in given or given[name].shape != tensor.shape):
            given[name] = tensor
    load_state_dict_strict(network, given, backbone.weights, ignore=("aux_classifier.",))


@torch.no_grad()
def calibrate_batch_norm(
    network: nn.Module,
    size: int,
    seed: int,
    run: Callable[[nn.Module, torch.Tensor], object] = nn.Module.__call__,
) -> None:
    """Give a random network's batch norms weights and biases that make noise come out at deviation 1.

    Their statistics never move here, and as they are made (mean 0, deviation 1) a deep network's signals
    fade or explode. The noise is drawn from the seed; no data is seen. Weights travel, statistics don't,
    so this is in the weights.
    """

    def settle(norm: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        deviation, mean = torch.std_mean(given[0], dim=(0, 2, 3))
        # A channel that hardly says a thing isn't made to shout.
        scale = 1 / deviation.clamp_min(max(1e-6, 0.1 * float(deviation.mean())))
        norm.weight.copy_(scale)
        norm.bias.copy_(-mean * scale)

    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    with global_stream(seed, "init", "norms"):
        rough = nn.functional.interpolate(torch.randn(16, 3, 8, 8), (size, size), mode="bilinear")
        run(network, rough + torch.randn(16, 3, size, size) / 3)
    for hook in hooks:
        hook.remove()
