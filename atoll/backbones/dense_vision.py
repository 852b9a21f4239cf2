"""Whole pictures as squares, for tasks that say where things are: pixels and places keep their relation.

Unlike for classification nothing is cut off: both sides are resized to the one size, and so are masks and
boxes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_weights
from atoll.backbones.encoder import PIXELS, Batch, Encoder, FixedInput
from atoll.backbones.options import refuse_augment
from atoll.backbones.resolve import Backbone
from atoll.backbones.torchvision_models import TorchvisionKind, torchvision_names
from atoll.data.images import decode_image, eight_bits, scaled
from atoll.data.schema import file_bytes
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.protocol.random_streams import global_stream

SIZE = 128
"""Of a picture's sides, for networks of ours, where the job names no other."""
SEGFORMER_SIZE = 512
"""What transformers resizes a SegFormer's pictures to, where its folder doesn't say."""

_TURNED = range(5, 9)
"""EXIF orientations that swap width and height."""


class PictureEncoder(Encoder):
    """A network that looks at whole pictures, and has its own head inside."""

    def __init__(self, model: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.width = 0
        self.size = size
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._std = torch.tensor(std).view(3, 1, 1)

    def preprocess(self, inputs: Sequence[bytes]) -> list[torch.Tensor]:
        """8-bit pixels [3, s, s] of the whole picture."""
        return [self._pixels(data) for data in inputs]

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        return {PIXELS: scaled(ready, self._mean, self._std)}

    def _pixels(self, data: bytes) -> torch.Tensor:
        image = decode_image(data, "image", verify=False)  # who read it has seen to that
        return eight_bits(image.resize((self.size, self.size), Image.Resampling.BILINEAR))


class WholePictures(PictureEncoder):
    """As its base, for networks whose only argument is a batch of pictures."""

    @property
    def fixed_input(self) -> FixedInput:
        return FixedInput(PIXELS, (3, self.size, self.size))


def size_of(job: Job, backbone: Backbone) -> int:
    """The side of the square that pictures become: the job's, else the network's own."""
    return job.backbone.image_size or own_size(backbone)


def own_size(backbone: Backbone) -> int:
    """The side that the network's own pictures had; the shorter one, where they were no squares."""
    if backbone.kind == "torchvision":
        return _torchvision_size(backbone.name)
    if backbone.kind == "hf" and backbone.folder is not None:
        return _folder_size(backbone.folder)
    return SIZE


@cache
def _torchvision_size(name: str) -> int:
    """As a segmenter's published weights say, or a detector's own transform."""
    from torchvision import models

    if name in torchvision_names("segmentation"):
        return int(models.get_model_weights(name).DEFAULT.transforms().resize_size[0])
    if name in torchvision_names("detection"):
        with torch.device("meta"):
            transform = models.get_model(name, weights=None, weights_backbone=None).transform
        return int((transform.fixed_size or transform.min_size)[0])
    return SIZE


def _folder_size(folder: Path) -> int:
    """As a transformers folder's `preprocessor_config.json` says: a number, or a table of one or two."""
    try:
        size = json.loads((folder / "preprocessor_config.json").read_text("utf-8")).get("size")
    except (OSError, ValueError, AttributeError):
        return SEGFORMER_SIZE  # whoever loads the network says what is wrong with its folder
    sides = list(size.values()) if isinstance(size, dict) else [size]
    whole = [side for side in sides if isinstance(side, int) and side > 0]
    return min(whole, default=SEGFORMER_SIZE)


def describe_size(job: Job, size: int) -> str:
    """What pictures become, for a run's first lines."""
    whose = "" if job.backbone.image_size else ", the network's own size (backbone.image_size says another)"
    return f"pictures resized to {size} x {size}{whose}"


def noise_pictures(job: Job, size: int) -> int:
    """How many pictures of noise a random network is settled on: fewer where its own size is large."""
    return 16 if job.backbone.image_size else max(4, 16 * SIZE**2 // size**2)


@torch.no_grad()
def check_size(body: nn.Module, job: Job, backbone: Backbone) -> None:
    """Raises ConfigError where the job's pictures are too small for the network to make anything of them."""
    size = job.backbone.image_size
    if size is None or size >= (network_size := own_size(backbone)):
        return
    try:
        body(torch.zeros(1, 3, size, size))
    except (RuntimeError, ValueError):
        raise ConfigError(
            f"backbone.image_size: {job.backbone.name} makes nothing of pictures of {size} x {size},"
            f" expected a larger size (its own is {network_size})"
        ) from None


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
    section: BackboneSection, backbone: Backbone, kind: TorchvisionKind, classes: int, network_name: str
) -> nn.Module:
    """torchvision's network of that kind with first values, none of them pretrained.

    Raises:
        WeightsError: it is no model of that kind; `network_name` names the small one of ours.
    """
    from torchvision import models

    known = torchvision_names(kind)
    if backbone.kind != "torchvision" or backbone.name not in known:
        expected = ", ".join((f"atoll:{network_name}", *(f"torchvision:{name}" for name in known)))
        raise WeightsError(f"backbone.name: {section.name} is no {kind} model, expected one of {expected}")
    network: nn.Module = models.get_model(
        backbone.name, weights=None, weights_backbone=None, num_classes=classes
    )
    return network


def fill_all_but_classes(network: nn.Module, head: str, backbone: Backbone) -> frozenset[str]:
    """Load weights; what the head has in another shape, being of other classes, stays fresh.

    Returns the names, within the head, of the parameters that are not fresh.

    Raises:
        WeightsError: they are of another network.
    """
    assert backbone.weights is not None
    state, stored = network.state_dict(), load_weights(backbone.weights)
    fresh = set()
    for name, tensor in state.items():
        if name.startswith(f"{head}.") and (name not in stored or stored[name].shape != tensor.shape):
            stored[name] = tensor
            fresh.add(name)
    load_state_dict_strict(network, stored, backbone.weights, ignore=("aux_classifier.",))
    part = network.get_submodule(head)
    return frozenset(name for name, _ in part.named_parameters() if f"{head}.{name}" not in fresh)


def noise(pictures: int, size: int) -> torch.Tensor:
    """Pictures [n, 3, s, s] of fine noise on coarse noise, all alike in brightness and contrast."""
    rough = nn.functional.interpolate(torch.randn(pictures, 3, 8, 8), (size, size), mode="bilinear")
    return rough + torch.randn(pictures, 3, size, size) / 3


def varied_noise(pictures: int, size: int) -> torch.Tensor:
    """The same, each picture with a brightness, a colour and a contrast of its own."""
    contrast = 1.5 * torch.rand(pictures, 1, 1, 1)
    return contrast * noise(pictures, size) + torch.randn(pictures, 3, 1, 1)


@torch.no_grad()
def calibrate_batch_norm(
    network: nn.Module,
    size: int,
    seed: int,
    run: Callable[[nn.Module, torch.Tensor], object] = nn.Module.__call__,
    *,
    pictures: int = 16,
    draw: Callable[[int, int], torch.Tensor] = noise,
) -> None:
    """Give a random network's batch norms weights and biases that make noise come out at deviation 1.

    Their statistics never move here, and as they are made (mean 0, deviation 1) a deep network's signals
    fade or explode. The noise is drawn from the seed; no data is seen, and the number of threads changes no
    bit. Weights travel, statistics don't, so this is in the weights.
    """

    def settle(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        deviation, mean = torch.std_mean(inputs[0], dim=(0, 2, 3))
        # A channel that hardly says a thing isn't made to shout.
        scale = 1 / deviation.clamp_min(max(1e-6, 0.1 * float(deviation.mean())))
        norm.weight.copy_(scale)
        norm.bias.copy_(-mean * scale)

    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(settle) for norm in norms]
    with global_stream(seed, "init", "norms"), _one_thread():
        run(network, draw(pictures, size))
    for hook in hooks:
        hook.remove()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
