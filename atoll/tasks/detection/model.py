"""torchvision's detectors as a model: `forward` returns their losses, `predict` the boxes that they find.

In a batch boxes are [batch, most, 5]: x1, y1, x2, y2 in pixels of the resized square, and the class; rows of
class -1 are padding. In the network class 0 is the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from atoll.backbones.dense_vision import (
    PictureEncoder,
    calibrate_batch_norm,
    check_size,
    fill_all_but_classes,
    noise_pictures,
    of_torchvision,
    size_of,
)
from atoll.backbones.encoder import TARGETS, Batch, Model
from atoll.backbones.options import options_of
from atoll.backbones.resolve import BODIED, Backbone
from atoll.backbones.small_vision import DETECTOR, SmallPictureOptions, small_detector
from atoll.backbones.vision import IMAGENET_MEAN, IMAGENET_STD
from atoll.job.job import Job
from atoll.protocol.random_streams import global_stream
from atoll.tasks.detection.faster_rcnn import bodied_detector

Found = dict[str, torch.Tensor]


class Detector(Model):
    """A detector; its head classifies and places boxes: Faster R-CNN's box predictor, SSD's head."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """The detector's losses, [losses]; the batch must have targets.

        In training they are torchvision's, in which a picture's weight depends on what is sampled from the
        whole batch. Without gradients they are the mean of each picture's own losses, so that sums over
        batches and clients are meaningful.
        """
        images, targets = list(batch["pixel_values"]), _as_torchvision(batch[TARGETS])
        if torch.is_grad_enabled():
            return self._losses(images, targets)
        each = []
        for image, target in zip(images, targets, strict=True):
            # torchvision samples proposals; this must not depend on earlier calls.
            with global_stream(0, "proposals"):
                each.append(self._losses([image], [target]))
        return torch.stack(each).mean(0)

    def _losses(self, images: Sequence[torch.Tensor], targets: Sequence[Found]) -> torch.Tensor:
        network: Any = self.backbone.model
        parts = [
            network,
            *(getattr(network, name) for name in ("rpn", "roi_heads") if hasattr(network, name)),
        ]
        before = [part.training for part in parts]
        try:
            # Only these modules' flags decide whether losses are returned; other layers keep theirs.
            _set_training(parts, [True] * len(parts))
            losses = network(images, targets)
        finally:
            _set_training(parts, before)
        return torch.stack([losses[name] for name in sorted(losses)])

    def predict(self, batch: Batch) -> list[Found]:
        """For each picture `boxes` [k, 4], `scores` [k] and `labels` [k], which are classes from 0."""
        network: Any = self.backbone.model
        detections = network(list(batch["pixel_values"]))
        return [
            {
                "boxes": one["boxes"].float().cpu(),
                "scores": one["scores"].float().clamp(0, 1).cpu(),
                "labels": one["labels"].cpu() - 1,
            }
            for one in detections
        ]


def _set_training(parts: Sequence[nn.Module], values: Sequence[bool]) -> None:
    for part, value in zip(parts, values, strict=True):
        part.training = value


def _as_torchvision(targets: torch.Tensor) -> list[Found]:
    rows = [one[one[:, 4] >= 0] for one in targets]
    return [{"boxes": one[:, :4].float(), "labels": one[:, 4].to(torch.int64) + 1} for one in rows]


def load_detector(backbone: Backbone, job: Job, classes: Sequence[str]) -> Detector:
    """The detector in eval mode, with a head for these classes.

    Raises:
        WeightsError: the backbone is no detector, or its weights don't fit.
    """
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    size = size_of(job, backbone)
    with global_stream(job.seed, "init", "backbone"):
        network: Any = _network_of(backbone, job, size, len(classes) + 1).eval()
    network.transform = GeneralizedRCNNTransform(
        size, size, IMAGENET_MEAN, IMAGENET_STD, fixed_size=(size, size)
    )
    check_size(network.backbone, job, backbone)
    head = "roi_heads.box_predictor" if hasattr(network, "roi_heads") else "head"
    loaded: frozenset[str] = frozenset()
    if backbone.weights is None and (backbone.also is None or backbone.also.weights is None):
        calibrate_batch_norm(network, size, job.seed, run=_everything, pictures=noise_pictures(job, size))
    elif backbone.weights is not None:
        loaded = fill_all_but_classes(network, head, backbone)
    encoder = PictureEncoder(network, size, (0.0,) * 3, (1.0,) * 3)
    return Detector(encoder, network.get_submodule(head), loaded)


def _network_of(backbone: Backbone, job: Job, size: int, classes: int) -> nn.Module:
    """The network with random weights; `classes` includes the background."""
    if (backbone.kind, backbone.name) == ("atoll", DETECTOR):
        options = options_of(job.backbone.options, SmallPictureOptions, "backbone.options")
        return small_detector(options, size, classes)
    if (backbone.kind, backbone.name) == ("atoll", BODIED):
        return bodied_detector(backbone, job.backbone, size, classes, job.seed)
    return of_torchvision(job.backbone, backbone, "detection", classes, DETECTOR)


def _everything(network: nn.Module, noise: torch.Tensor) -> None:
    network(list(noise))
