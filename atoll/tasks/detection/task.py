"""Object detection: predicts boxes with classes; torchvision's detectors; COCO's mAP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from atoll.backbones.dense_vision import (
    SIZE,
    describe_size,
    picture_size,
    refuse_variation,
    size_of,
    without_other_parts,
)
from atoll.backbones.encoder import Batch, Model
from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.images import IMAGE_SUFFIXES, Depth, decode_image, image_bytes, read_image_input
from atoll.data.lazy import LazyColumn, LazyRows
from atoll.data.schema import Schema
from atoll.data.shard import Shard, canonical_order
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection, Job
from atoll.job.section import Count, Options, Section
from atoll.protocol.messages import DataInfo
from atoll.tasks.classes import agreed, class_fields, named
from atoll.tasks.data_info import InfoField
from atoll.tasks.detection.data import BOXES
from atoll.tasks.detection.model import load_detector
from atoll.tasks.drawing import boxes_over
from atoll.tasks.schema_task import SchemaTask

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

SHOWN_SCORE = 0.5
"""The lowest score of a box that `atoll predict` shows."""


class DetectionOptions(Section):
    """`task.options` of object detection: of a picture's boxes the first `max_boxes` are used, or all."""

    max_boxes: Count | None = None


@dataclass(frozen=True)
class Detection(SchemaTask):
    """Object detection; targets are [n, most, 5]: x1, y1, x2, y2 in the resized square, and the class.

    Rows of class -1 are padding.
    """

    info_fields = (
        *class_fields(),
        InfoField(
            "most", "example", "task.options.max_boxes", "the most boxes of a picture that are used", "number"
        ),
    )

    name: str = "object-detection"
    summary: str = "boxes with classes; torchvision's Faster R-CNN, SSDlite; COCO's mAP, mAP50"
    uses_pooled_features: bool = False
    sees_targets: bool = True
    primary_metric: str = "map"
    size: int = SIZE
    inputs_description: str = ""
    reads_pictures: bool = True
    depth: Depth | None = None
    max_boxes: int | None = None

    def configured(self, job: Job, backbone: Backbone) -> Detection:
        options = options_of(job.task.options, DetectionOptions)
        size = size_of(job, backbone)
        size_text = describe_size(job, size)
        bound = replace(self, size=size, inputs_description=size_text, max_boxes=options.max_boxes)
        return replace(bound, depth=Depth.of(job.data))

    def check(self, job: Job) -> None:
        options_of(job.task.options, DetectionOptions)
        refuse_variation(job, self.name)
        if "example" in job.privacy.units:
            raise ConfigError(
                f"privacy.unit: object-detection has no example-level privacy, found {job.privacy.unit!r}:"
                ' a detector\'s losses are shared by all pictures of a batch; expected "client" or "none"'
            )
        if job.train.accumulate > 1:
            raise ConfigError(
                f"train.accumulate: expected 1 for object-detection, found {job.train.accumulate}: a"
                " detector's losses are shared by all pictures of a batch, so that parts don't add up"
            )

    def records(self, options: Options) -> Schema:
        return BOXES

    def from_builtin(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        return BOXES.adopted(without_other_parts(splits, ("image", "boxes", "classes")))

    def local_info(self, dataset: Dataset, data: DataSection, options: Options) -> DataInfo:
        """The classes (the job's in its order, else the data's, sorted), and the most boxes of a picture.

        Raises:
            DataError: the data has a class that isn't in `data.classes`.
        """
        classes = dataset["classes"][:]
        present, most = {name for names in classes for name in names}, max(map(len, classes), default=0)
        max_boxes = options_of(options, DetectionOptions).max_boxes
        return named(present, data, "classes", "class") | {"most": max_boxes or most}

    def fits(self, dataset: Dataset, data: DataSection, options: Options) -> Sequence[int]:
        """The numbers of the rows whose boxes' classes are all in `data.classes`; all rows without it."""
        known = set(data.classes or ())
        classes = dataset["classes"][:]
        return [row for row, names in enumerate(classes) if data.classes is None or known.issuperset(names)]

    def merge_info(self, data_info: Sequence[DataInfo]) -> DataInfo:
        """The classes of `data.classes`, else the sorted union of the clients' classes.

        Raises:
            ConfigError: there are no boxes at all.
        """
        classes = agreed(data_info, "classes")
        if not classes:
            raise ConfigError("object-detection needs boxes of at least one class, found none")
        return {"classes": classes, "most": max(f["most"] for f in data_info)}

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        order = canonical_order(keys)
        index = {name: number for number, name in enumerate(data_info["classes"])}
        rows = dataset.select_columns(["boxes", "classes"])[:]
        boxes = [row[: self.max_boxes] for row in rows["boxes"]]
        most = max(1, data_info["most"], *(len(boxes[row]) for row in order))
        targets = torch.full((len(order), most, 5), -1.0)
        for target, row in zip(targets, order, strict=True):
            width, height = picture_size(dataset[row]["image"])
            scale = torch.tensor([self.size / width, self.size / height] * 2)
            for place, (box, name) in enumerate(zip(boxes[row], rows["classes"][row], strict=False)):
                if name not in index:
                    raise DataError(f"class {name!r} is not one of the run's classes {data_info['classes']}")
                target[place, :4] = (torch.tensor(box) * scale).clamp(0, self.size)
                target[place, 4] = index[name]
        inputs = LazyRows(LazyColumn(dataset, "image", image_bytes), tuple(order))
        return Shard(inputs, targets, tuple(keys[row] for row in order))

    def input_suffixes(self) -> tuple[str, ...]:
        return IMAGE_SUFFIXES

    def parse_input(self, text: str) -> Any:
        """The bytes of an image file."""
        return read_image_input(text, self.depth)

    def network(self, backbone: Backbone, job: Job, data_info: DataInfo) -> Model:
        return load_detector(backbone, job, data_info["classes"])

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The sum of the detector's losses, each of which is a mean already."""
        return outputs.sum()

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection

        from atoll.tasks.detection.metrics import BoxAveragePrecision

        count = len(data_info["classes"])
        return MetricCollection(
            {"map": BoxAveragePrecision(count), "map50": BoxAveragePrecision(count, thresholds=(0.5,))},
            compute_groups=False,
        )

    def format_predictions(self, predictions: Any, data_info: DataInfo) -> list[dict[str, Any]]:
        """The boxes with a score of at least 0.5, as fractions of the picture's width and height."""
        rows = []
        for one in predictions:
            boxes = [
                {
                    "class": data_info["classes"][int(label)],
                    "score": round(float(score), 4),
                    "box": [round(side / self.size, 4) for side in box.tolist()],
                }
                for box, score, label in zip(one["boxes"], one["scores"], one["labels"], strict=True)
                if score >= SHOWN_SCORE
            ]
            label = ", ".join(str(box["class"]) for box in boxes) or "nothing"
            rows.append({"label": label, "boxes": boxes})
        return rows

    def answers(
        self, model: Model, batch: Batch, inputs: Sequence[Any], data_info: DataInfo
    ) -> list[dict[str, Any]]:
        """As `format_predictions`, with the picture's `size` [width, height] and each box in `pixels` too."""
        answers = super().answers(model, batch, inputs, data_info)
        for answer, data in zip(answers, inputs, strict=True):
            size = decode_image(data, "image", verify=False).size
            answer["size"] = list(size)
            for one in answer["boxes"]:
                one["pixels"] = [round(p * s, 1) for p, s in zip(one["box"], size * 2, strict=True)]
        return answers

    def files(
        self, answer: Mapping[str, Any], source: Any, data_info: DataInfo, *, overlay: bool
    ) -> dict[str, bytes]:
        """The picture with its boxes and their classes and scores drawn on it."""
        picture = decode_image(source, "image", verify=False)
        return {"boxes.png": boxes_over(picture, answer["boxes"], data_info["classes"])}


DETECTION = Detection()
