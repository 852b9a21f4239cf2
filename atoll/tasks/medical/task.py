"""Medical image classification, split by patient; AUROC, sensitivity at a high specificity, calibration.

Of two classes the second is the finding (set `data.classes = ["no", "yes"]` to choose). All images of a
patient are on the same side of every split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from atoll.backbones.brought.names import IMAGE_AUGMENTATIONS
from atoll.backbones.vision import load_vision_encoder
from atoll.data.classification import read_images
from atoll.data.dataset import Dataset
from atoll.data.schema import Schema, file_bytes
from atoll.data.shard import Shard, canonical_order
from atoll.data.writers import write_images
from atoll.job.section import Options
from atoll.protocol.messages import DataInfo
from atoll.protocol.validation_split import by_fraction, validation_marks
from atoll.tasks.classification import Classification
from atoll.tasks.medical.dicom import SCANS, as_picture, read_scan_input
from atoll.tasks.schema_task import SchemaTask

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


THRESHOLDS = 1001
"""The number of thresholds at which the AUROC's counts are taken."""


@dataclass(frozen=True)
class Medical(SchemaTask, Classification):
    """Image classification split by patient; without a patient column every image counts as one patient."""

    primary_metric: str = "auroc"
    has_own_split: bool = True

    def records(self, options: Options) -> Schema:
        return SCANS

    def groups(self, dataset: Dataset) -> list[str] | None:
        return list(dataset["patient"][:]) if "patient" in dataset.column_names else None

    def shard(self, dataset: Dataset, data_info: DataInfo, keys: Sequence[bytes] | None = None) -> Shard:
        keys = self.keys(dataset) if keys is None else keys
        plain = super().shard(dataset, data_info, keys)
        patients = self.groups(dataset)
        groups = tuple(patients[row] for row in canonical_order(keys)) if patients else ()
        return Shard(plain.inputs, plain.targets, plain.keys, groups)

    def split(
        self, shard: Shard, seed: int, fraction: float, *, helped: bool = True
    ) -> tuple[list[int], list[int]]:
        """(training rows, validation rows): a hash of a patient's name decides for all its images."""
        owners = [name.encode() for name in shard.groups] or shard.keys
        is_validation = by_fraction(validation_marks(owners, seed), fraction, helped=helped)
        return np.flatnonzero(~is_validation).tolist(), np.flatnonzero(is_validation).tolist()

    def input_suffixes(self) -> tuple[str, ...]:
        return (*super().input_suffixes(), ".dcm")

    def parse_input(self, text: str) -> Any:
        """The picture in an image file or DICOM file."""
        return read_scan_input(text, self.depth)

    def metrics(self, data_info: DataInfo) -> MetricCollection:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import (
            BinaryAccuracy,
            MulticlassAccuracy,
        )

        from atoll.tasks.medical.metrics import (
            BinnedAuroc,
            BinnedCalibrationError,
            BinnedMacroAuroc,
            SensitivityAtSpecificity,
        )

        count = len(data_info["classes"])
        if count == 2:
            metrics = {
                "auroc": BinnedAuroc(thresholds=THRESHOLDS),
                "sensitivity": SensitivityAtSpecificity(0.95, THRESHOLDS),
                "calibration_error": BinnedCalibrationError(),
                "accuracy": BinaryAccuracy(),
            }
        else:
            metrics = {
                "auroc": BinnedMacroAuroc(count, THRESHOLDS),
                "calibration_error": BinnedCalibrationError(),
                "accuracy": MulticlassAccuracy(count, average="micro"),
            }
        return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]

    def metric_inputs(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """(probabilities, targets [n]): of the finding [n] with two classes, else of all [n, classes]."""
        stated = torch.softmax(predictions.to(torch.float64), dim=1)
        return (stated[:, 1] if stated.shape[1] == 2 else stated), targets


def _picture(cell: Mapping[str, Any]) -> bytes:
    return as_picture(file_bytes(cell, "image"), "image")


MEDICAL_IMAGING = Medical(
    name="medical-imaging",
    column="image",
    summary="a finding from a scan (PNG, JPEG, DICOM), split by patient; AUROC, sensitivity, calibration",
    reader=read_images,
    writer=write_images,
    convert=_picture,
    load_encoder=load_vision_encoder,
    augmentations=IMAGE_AUGMENTATIONS,
    has_channels=True,
    reads_pictures=True,
)
