"""`atoll:detector`: torchvision's Faster R-CNN on the layers of a pretrained classifier, called its body.

Published detectors are large, while weights of small classifiers are often available. The body's features at
1/8 and 1/16 of a picture's sides are combined by a feature pyramid (Lin et al. 2017).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.backbones.torchvision_models import torchvision_names
from atoll.backbones.vision import load_vision_encoder, torchvision_trunk
from atoll.errors import WeightsError
from atoll.job.job import BackboneSection
from atoll.job.section import Section
from atoll.protocol.random_streams import stream_seed

HALVINGS = (3, 4)
_PROBE = 64
"""The side in pixels of the picture with which the sizes of the body's layers are determined."""


class BodiedOptions(Section):
    """`backbone.options`: the classifier `torchvision:NAME`, and the number of channels of the pyramid."""

    body: str
    width: Annotated[int, Field(ge=8, le=1024)] = 64


def bodied_detector(
    backbone: Backbone, section: BackboneSection, size: int, classes: int, seed: int
) -> nn.Module:
    """A Faster R-CNN (Ren et al. 2015) with the body's weights, if it has any, and new heads.

    Anchors have 1/12 to 1/2 of the side of a picture of `size` pixels; `classes` includes the background.

    Raises:
        WeightsError: the body isn't a sequence of layers with features of the two sizes.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    options = options_of(section.options, BodiedOptions, "backbone.options")
    body = backbone.also
    if body is None or body.kind != "torchvision" or body.name not in torchvision_names():
        raise WeightsError(
            f"backbone.options.body: expected a torchvision classifier, found {options.body!r}"
        )
    layers = _layers(body, section, seed)
    levels = _levels(layers)
    if len(levels) < len(HALVINGS):
        raise WeightsError(
            f"backbone.options.body: {options.body} has no features at an eighth and a sixteenth of a"
            " picture's sides, layer after layer; expected one like torchvision:mobilenet_v2"
        )
    names = {name: str(place) for place, (name, _) in enumerate(levels)}
    pyramid = BackboneWithFPN(layers, names, [channels for _, channels in levels], options.width)
    hidden = 4 * options.width
    network: nn.Module = FasterRCNN(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(
            ((size // 12, size // 8), (size // 6, size // 4), (size // 3, size // 2)), ((0.5, 1.0, 2.0),) * 3
        ),
        rpn_pre_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=150,
        rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], output_size=5, sampling_ratio=2),
        box_head=nn.Sequential(nn.Flatten(), nn.Linear(25 * options.width, hidden), nn.ReLU()),
        box_predictor=FastRCNNPredictor(hidden, classes),
        box_batch_size_per_image=48,
        box_detections_per_img=60,
    )
    return network


def _layers(body: Backbone, section: BackboneSection, seed: int) -> nn.Sequential:
    """The classifier's layers in their order, with its weights if there are any."""
    body_seed = stream_seed(seed, "init", "body")
    if body.weights is None:  # its norms are settled together with the detector's
        trunk = torchvision_trunk(body.name, body_seed)[0].eval()
    else:
        trunk = load_vision_encoder(body, section, body_seed).model
    features = getattr(trunk, "features", None)
    row = features if isinstance(features, nn.Module) else trunk
    return nn.Sequential(OrderedDict(row.named_children()))


@torch.no_grad()
def _levels(layers: nn.Sequential) -> list[tuple[str, int]]:
    """(name, channels) of the last layer at each of the two feature sizes; fewer if the body lacks one."""
    levels: dict[int, tuple[str, int]] = {}
    values = torch.zeros(1, 3, _PROBE, _PROBE)
    for name, layer in layers.named_children():
        try:
            values = layer(values)
        except (RuntimeError, ValueError, AssertionError):  # what follows the features is of another kind
            break
        if values.dim() == 4 and values.shape[2] == values.shape[3]:
            levels[round(math.log2(_PROBE / values.shape[2]))] = (name, values.shape[1])
    return [levels[halvings] for halvings in HALVINGS if halvings in levels]
