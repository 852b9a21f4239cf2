"""`lesion-masks`: slices of CT and MR volumes with the mask of a lesion, decoded from pyradiomics' files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.datasets.synthetic.drawing import as_bytes, image_column
from atoll.datasets.synthetic.png import grey_png
from atoll.downloads.pypi import Progress, fetch_package
from atoll.errors import DataError


@dataclass(frozen=True)
class Volume:
    """A patient's volume, and the values that become black and white: Hounsfield units, or the scanner's."""

    patient: str
    organ: str
    modality: str
    black: float
    white: float


VOLUMES = (
    Volume("brain1", "brain", "MR", 0, 1600),
    Volume("brain2", "brain", "MR", 0, 1000),
    Volume("breast1", "breast", "MR", 0, 200),
    Volume("lung1", "lung", "CT", -1000, 400),
    Volume("lung2", "lung", "CT", -1000, 400),
)


def lesion_masks(offline: bool = False, progress: Progress | None = None) -> dict[str, pa.Table]:
    """Axial slices of five patients: columns image, mask (0 background, 1 lesion), patient, organ, modality.

    All slices that the lesion is in, and as many of the nearest without it. Greys are cut to the window
    of the volume (`VOLUMES`), never fitted to a slice; the front of the body is above. Neighbouring slices
    are much alike, and a random test set has some of every patient: good to try with, not to judge by.
    """
    folder = fetch_package("pyradiomics", offline=offline, progress=progress)
    columns: dict[str, list[Any]] = {name: [] for name in ("patient", "organ", "modality")}
    images, masks = [], []
    for volume in VOLUMES:
        values = _upright(folder / f"{volume.patient}_image.nrrd")
        lesion = _upright(folder / f"{volume.patient}_label.nrrd") != 0
        if values.shape != lesion.shape:
            raise DataError(
                f"{folder}/{volume.patient}_*: sizes {values.shape} and {lesion.shape}, expected equal"
            )
        greys = as_bytes((values - volume.black) * (255 / (volume.white - volume.black)))
        for number in _chosen(lesion):
            images.append(grey_png(greys[number]))
            masks.append(grey_png(lesion[number].astype(np.uint8)))
            for name, column in columns.items():
                column.append(getattr(volume, name))
    table = {"image": image_column(images), "mask": image_column(masks)}
    return {"train": pa.table({**table, **{name: pa.array(column) for name, column in columns.items()}})}


def _upright(path: Path) -> NDArray[Any]:
    """The values [slice, row, column] with the front of the body in the first row, the patient's right first.

    The files' axes run along the patient's left, back and head, or against these.
    """
    import nrrd

    values, header = nrrd.read(str(path))
    steps = np.asarray(header["space directions"])
    if header["space"] != "left-posterior-superior" or np.count_nonzero(steps - np.diag(np.diag(steps))):
        raise DataError(f"{path}: oblique or of another space, expected axes to the left, back and head")
    against = tuple(np.flatnonzero(np.diag(steps) < 0).tolist())
    return np.flip(np.asarray(values), against).transpose(2, 1, 0)


def _chosen(lesion: NDArray[np.bool_]) -> list[int]:
    """The slices with a lesion and as many without it, the nearest, the lower first; in order."""
    numbers = np.arange(len(lesion))
    inside = np.flatnonzero(lesion.any(axis=(1, 2)))
    distance = np.abs(numbers[:, None] - inside).min(axis=1)
    near = np.lexsort((numbers, distance))
    return sorted(near[: 2 * len(inside)].tolist())
