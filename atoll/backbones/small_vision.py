"""Networks for small pictures that learn from nothing in minutes on a CPU.

`atoll:small-detector` and `atoll:small-segmenter` are torchvision's own classes over a few convolutions, for
pictures of a hundred pixels a side. Norms are over groups of one picture's channels, so a picture never
depends on its batch. `atoll:lenet` is the CNN that federated methods are compared with on Fashion-MNIST.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from atoll.errors import ConfigError
from atoll.job.section import Section
from atoll.protocol.random_streams import global_stream

LENET_WIDTH = 84
"""Of `atoll:lenet`'s features."""
LENET_LEAST = 16
"""Pixels a side that two convolutions of 5 x 5, each halved after it, leave one of."""

DETECTOR = "small-detector"
SEGMENTER = "small-segmenter"
_GROUPS = 8
_FEATURES = 8 * _GROUPS
"""Channels that the heads are given."""


def lenet(side: int, seed: int) -> nn.Module:
    """LeNet-5 without its last layer: [batch, 3, side, side] with values from 0 to 1 to [batch, 84].

    LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", with ReLU and the largest of
    four, as NIID-Bench has it (Li et al. 2022): convolutions of 5 x 5 to 6 and to 16 channels, each halved,
    then layers of 120 and 84. Colours become grey first; a grey picture is what it was.

    Raises:
        ConfigError: pictures of that size are too small.
    """
    if side < LENET_LEAST:
        raise ConfigError(
            f"backbone.image_size: atoll:lenet expects {LENET_LEAST} or more pixels a side, found {side}"
        )
    left = ((side - 4) // 2 - 4) // 2
    with global_stream(seed, "init", "backbone"):
        return nn.Sequential(
            _Grey(),
            nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            nn.Sequential(nn.Linear(16 * left**2, 120), nn.ReLU()),
            nn.Sequential(nn.Linear(120, LENET_WIDTH), nn.ReLU()),
        )


class _Grey(nn.Module):
    """The mean of the three colours."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] to [batch, 1, height, width]."""
        return pictures.mean(1, keepdim=True)


class SmallPictureOptions(Section):
    """`backbone.options` of both: the channels of the first convolution, a multiple of eight."""

    width: Annotated[int, Field(ge=_GROUPS, le=1024, multiple_of=_GROUPS)] = 32


class _Strided(nn.Module):
    """Features at a quarter of the picture's sides, or at an eighth."""

    def __init__(self, width: int, halvings: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _block(3, width, 2),
            _block(width, width, 1),
            _block(width, 2 * width, 2),
            _block(2 * width, 2 * width, 1),
            _block(2 * width, _FEATURES, 1 if halvings == 2 else 2),
            *([_block(_FEATURES, _FEATURES, 1)] if halvings == 3 else []),
        )
        self.out_channels = _FEATURES

    def forward(self, pictures: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """{"out": [batch, channels, height, width]}."""
        return OrderedDict(out=self.blocks(pictures))


def _block(channels_in: int, made: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, made, 3, stride, 1, bias=False), nn.GroupNorm(_GROUPS, made), nn.ReLU()
    )


def small_detector(options: SmallPictureOptions, size: int, classes: int) -> nn.Module:
    """A Faster R-CNN (Ren et al. 2015) for things of an eighth to a third of a picture of `size` pixels.

    `classes` counts the background.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    hidden = 2 * _FEATURES
    network: nn.Module = FasterRCNN(
        _Strided(options.width, 3),
        rpn_anchor_generator=AnchorGenerator(((size // 8, size // 5, size // 3),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["out"], output_size=5, sampling_ratio=2),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(25 * _FEATURES, hidden), nn.ReLU()),
        box_predictor=FastRCNNPredictor(hidden, classes),
        box_batch_size_per_image=32,
        box_detections_per_img=50,
    )
    return network


def small_segmenter(options: SmallPictureOptions, classes: int) -> nn.Module:
    """A DeepLabV3 (Chen et al. 2017) at a quarter of the picture's sides."""
    from torchvision.models.segmentation import DeepLabV3
    from torchvision.models.segmentation.deeplabv3 import ASPP

    pyramid = ASPP(_FEATURES, atrous_rates=(2, 4, 8), out_channels=_FEATURES)
    head = nn.Sequential(pyramid, _block(_FEATURES, _FEATURES, 1), nn.Conv2d(_FEATURES, classes, 1))
    network: nn.Module = DeepLabV3(_Strided(options.width, 2), _without_batches(head))
    return network


def _without_batches(network: Any) -> nn.Module:
    """The network with norms over groups in place of those over batches, and no dropout."""
    for name, child in list(network.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, nn.GroupNorm(_GROUPS, child.num_features))
        elif isinstance(child, nn.Dropout):
            setattr(network, name, nn.Identity())
        else:
            _without_batches(child)
    return network  # type: ignore[no-any-return]
