"""Semantic segmentation: a class for every pixel; torchvision's networks or SegFormer; mean IoU, Dice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from atoll.backbones.checkpoint import pretrained_names
from atoll.backbones.dense_vision import (
    SIZE,
    WholePictures,
    calibrate_batch_norm,
    describe_size,
    fill_all_but_classes,
    noise_pictures,
    of_torchvision,
    refuse_variation,
    size_of,
    without_other_parts,
)
from atoll.backbones.encoder import PIXELS, Batch, Model
from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.backbones.small_vision import SEGMENTER, SmallPictureOptions, small_segmenter
from atoll.backbones.vision import IMAGENET_MEAN, IMAGENET_STD
from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.images import IMAGE_SUFFIXES, Depth, decode_image, read_image_input
from atoll.data.lazy import LazyColumn, LazyRows
from atoll.data.schema import Schema, file_bytes
from atoll.data.shard import Lazy, Shard, canonical_order
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Options, Section
from atoll.protocol.messages import DataInfo
from atoll.protocol.random_streams import global_stream
from atoll.tasks.data_info import InfoField
from atoll.tasks.drawing import hex_colour, mask_over, mask_png
from atoll.tasks.schema_task import SchemaTask
from atoll.tasks.segmentation.data import IGNORED, MASKS, highest_class, read_mask
from atoll.tasks.segmentation.segformer import load_segformer

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

CLASSES = "task.options.classes"


class SegmentationOptions(Section):
    """`task.options` of segmentation: the classes for which the pixel values 0, 1, … stand."""

    classes: tuple[str, ...] | None = None


class Segmenter(Model):
    """A torchvision segmentation network or a SegFormer; the head is its pixel classifier."""

    backbone: WholePictures

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits of every class at every pixel, [batch, classes, s, s]; SegFormer's are upsampled by 4."""
        logits = self.backbone.model(batch[PIXELS])
        if "out" in logits:
            scores: torch.Tensor = logits["out"]
            return scores
        side = self.backbone.size
        return nn.functional.interpolate(logits["logits"], (side, side), mode="bilinear")

    def predict(self, batch: Batch) -> torch.Tensor:
        """The most likely class at every pixel, [batch, s, s]."""
        return self.forward(batch).argmax(1)


@dataclass(frozen=True)
class Segmentation(SchemaTask):
    """Semantic segmentation; targets are masks [n, s, s], resized to the network's input by nearest pixel."""

    info_fields = (
        InfoField("classes", "example", CLASSES, "the list of classes", "names", IGNORED),
        InfoField("highest", "example", CLASSES, "the list of classes", "number", IGNORED),
    )

    name: str = "segmentation"
    summary: str = "a class for every pixel; torchvision's DeepLabV3, LRASPP, FCN, SegFormer; mean IoU"
    uses_pooled_features: bool = False
    primary_metric: str = "mean_iou"
    size: int = SIZE
    inputs_description: str = ""
    reads_pictures: bool = True
    depth: Depth | None = None

    def configured(self, job: Job, backbone: Backbone) -> Segmentation:
        size = size_of(job, backbone)
        return replace(self, size=size, inputs_description=describe_size(job, size), depth=Depth.of(job.data))

    def check(self, job: Job) -> None:
        options = options_of(job.task.options, SegmentationOptions)
        refuse_variation(job, self.name)
        if job.data.classes is not None:
            raise ConfigError("data.classes: expected the classes of pixels as task.options.classes instead")
        if options.classes is not None and len(options.classes) < 2:
            raise ConfigError(
                f"task.options.classes: expected at least two, as many as pixels can have,"
                f" found {list(options.classes)}"
            )

    def records(self, options: Options) -> Schema:
        return MASKS

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return MASKS.adopted(without_other_parts(splits, ("image", "mask")))

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The job's `task.options.classes`, or the highest class index in the masks.

        Raises:
            DataError: a mask has a class that the job doesn't name.
        """
        highest = max((highest_class(cell) for cell in dataset.cells("mask")), default=-1)
        named = options_of(options, SegmentationOptions).classes
        if named is None:
            return {"highest": highest}
        if highest >= len(named):
            raise DataError(
                f"a mask has class {highest}, expected 0 to {len(named) - 1}"
                f" (task.options.classes = {list(named)}) or {IGNORED}, which is ignored"
            )
        return {"classes": list(named)}

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The numbers of the rows whose masks have only classes that the job names."""
        named = options_of(options, SegmentationOptions).classes
        if named is None:
            return range(len(dataset))
        return [row for row, cell in enumerate(dataset.cells("mask")) if highest_class(cell) < len(named)]

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The job's classes; else the numbers from 0 to the highest class index of any client, as names.

        Raises:
            ConfigError: there are fewer than two classes.
        """
        named = next((f["classes"] for f in data_info if "classes" in f), None)
        classes = named or [str(c) for c in range(1 + max((f["highest"] for f in data_info), default=-1))]
        if len(classes) < 2:
            raise ConfigError(f"segmentation needs at least two classes of pixels, found {classes}")
        return {"classes": classes}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = tuple(canonical_order(keys))
        count = len(data_info["classes"])

        def target(row: int) -> torch.Tensor:
            mask = read_mask(file_bytes(dataset[row]["mask"], "mask"), "mask")
            known = mask[mask != IGNORED]
            if known.size and int(known.max()) >= count:
                raise DataError(
                    f"a mask has class {int(known.max())}, expected one of {data_info['classes']}"
                )
            return torch.from_numpy(_resized(mask, self.size)).to(torch.int64)

        inputs = LazyRows(LazyColumn(dataset, "image", _image), order)
        return Shard(inputs, Lazy(target, order), tuple(keys[row] for row in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return IMAGE_SUFFIXES

    def parse_input(self, text: str) -> Any:
        """The bytes of an image file."""
        return read_image_input(text, self.depth)

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        """The network in eval mode, with a last layer for these classes and without an auxiliary one.

        Raises:
            WeightsError: the backbone is no segmentation network, or its weights don't fit.
        """
        size = size_of(job, backbone)
        if backbone.kind == "hf":
            segformer, mean, std = load_segformer(backbone, len(data_info["classes"]), job.seed)
            encoder = WholePictures(segformer, size, mean, std)
            return Segmenter(
                encoder, segformer.decode_head, pretrained_names(segformer, "decode_head", backbone)
            )
        with global_stream(job.seed, "init", "backbone"):
            network = _network_of(backbone, job, len(data_info["classes"])).eval()
        loaded: frozenset[str] = frozenset()
        if backbone.weights is None:
            calibrate_batch_norm(network, size, job.seed, pictures=noise_pictures(job, size))
        else:
            loaded = fill_all_but_classes(network, "classifier", backbone)
        head = network.get_submodule("classifier")
        return Segmenter(WholePictures(network, size, IMAGENET_MEAN, IMAGENET_STD), head, loaded)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy: the mean over each example's labelled pixels, then over examples."""
        each = nn.functional.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="none")
        labelled = (targets != IGNORED).flatten(1).sum(1).clamp_min(1)
        return (each.flatten(1).sum(1) / labelled).mean()

    def num_with_target(self, targets: torch.Tensor) -> int:
        """The number of masks with at least one labelled pixel."""
        return int((targets != IGNORED).flatten(1).any(1).sum())

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.segmentation.metrics import Dice, MeanIoU

        count = len(data_info["classes"])
        return MetricCollection({"mean_iou": MeanIoU(count), "dice": Dice(count)}, compute_groups=False)

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(predicted classes, true classes) of all labelled pixels, each [pixels]."""
        labelled = targets != IGNORED
        return predictions.cpu()[labelled], targets[labelled]

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """The predicted classes, the largest area first, and each one's share of the pixels."""
        rows = []
        for mask in predictions:
            counts = torch.bincount(mask.flatten().cpu(), minlength=len(data_info["classes"]))
            shares = {
                data_info["classes"][c]: round(float(counts[c]) / mask.numel(), 4)
                for c in counts.argsort(descending=True).tolist()
                if counts[c]
            }
            rows.append({"label": ", ".join(shares), "shares": shares})
        return rows

    def answers(
        self, model: Model, batch: Batch, inputs: Sequence[Any], data_info: DataInfo
    ) -> list[dict[str, Any]]:
        """For every pixel of the original picture: `mask`, the class, and `scores`, its probability.

        Both are [height, width], of uint8 and float32; `colours` are those of the mask's file. Logits are
        resized before the highest is taken, so that edges are smooth at the picture's own resolution.
        """
        answers = []
        for scores, data in zip(model(batch).float().cpu(), inputs, strict=True):
            with_size = decode_image(data, "image", verify=False)
            size = (with_size.height, with_size.width)
            resized = nn.functional.interpolate(scores[None], size, mode="bilinear")[0]
            highest, mask = resized.softmax(0).max(0)
            (answer,) = self.format_predictions([mask], data_info)
            answer["colours"] = {name: hex_colour(number) for number, name in enumerate(data_info["classes"])}
            answers.append(answer | {"mask": mask.to(torch.uint8).numpy(), "scores": highest.numpy()})
        return answers

    def files(
        self, answer: Mapping[str, Any], source: Any, data_info: DataInfo, *, overlay: bool
    ) -> dict[str, bytes]:
        """The mask as a PNG of class indices with a palette, and with `overlay` the picture with the mask."""
        files = {"mask.png": mask_png(answer["mask"])}
        if overlay:
            picture = decode_image(source, "image", verify=False)
            files["overlay.png"] = mask_over(picture, answer["mask"], data_info["classes"])
        return files


def _image(cell: Mapping[str, Any]) -> bytes:
    return file_bytes(cell, "image")


def _network_of(backbone: Backbone, job: Job, classes: int) -> nn.Module:
    """The network with random weights."""
    if (backbone.kind, backbone.name) == ("atoll", SEGMENTER):
        options = options_of(job.backbone.options, SmallPictureOptions, "backbone.options")
        return small_segmenter(options, classes)
    return of_torchvision(job.backbone, backbone, "segmentation", classes, SEGMENTER)


def _resized(mask: np.ndarray, size: int) -> np.ndarray:
    return np.array(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


SEGMENTATION = Segmentation()
