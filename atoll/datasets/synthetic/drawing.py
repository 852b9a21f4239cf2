"""Simple figures on small images: which pixels they cover, the box around these, and the image's cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SIDE = 96
IMAGE_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Region = NDArray[np.bool_]
Pixels = NDArray[np.float64]

# The centre of each pixel, as rows and columns.
_Y, _X = np.mgrid[0:SIDE, 0:SIDE] + 0.5


def ellipse(x: float, y: float, width: float, height: float) -> Region:
    """The pixels of an ellipse around (x, y)."""
    region: Region = ((_X - x) / (width / 2)) ** 2 + ((_Y - y) / (height / 2)) ** 2 <= 1
    return region


def rectangle(x: float, y: float, width: float, height: float) -> Region:
    """The pixels of a rectangle around (x, y)."""
    region: Region = (np.abs(_X - x) <= width / 2) & (np.abs(_Y - y) <= height / 2)
    return region


def triangle(x: float, y: float, width: float, height: float) -> Region:
    """The pixels of a triangle that stands on its base, with its box around (x, y)."""
    below_top = _Y - (y - height / 2)
    region: Region = (np.abs(_X - x) <= below_top / height * width / 2) & (below_top <= height)
    return region


def box_of(region: Region) -> list[float]:
    """x1, y1, x2, y2 of the smallest box around a region's pixels, in pixels from the top left."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def as_bytes(pixels: Pixels) -> NDArray[np.uint8]:
    """Pixels of any values, cut to 0..255."""
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def image_column(images: Sequence[bytes]) -> pa.Array:
    """Encoded images as a column of cells."""
    return pa.array([{"bytes": image, "path": None} for image in images], IMAGE_CELL)


def box_column(boxes: Sequence[Sequence[Sequence[float]]]) -> pa.Array:
    """The boxes of every image as a column."""
    return pa.array(boxes, pa.list_(pa.list_(pa.float64())))


def cut(table: pa.Table, test: float = 0.2) -> dict[str, pa.Table]:
    """The first rows for training, and the last `test` of them for test."""
    train = table.num_rows - round(test * table.num_rows)
    return {"train": table.slice(0, train), "test": table.slice(train)}
