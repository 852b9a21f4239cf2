"""IDX files, as MNIST is published: the images of a split in one file, its labels in another."""

from __future__ import annotations

import gzip
import re
import zlib
from io import BytesIO
from math import prod
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.data.diagnostics import opened, shown
from atoll.data.folders import checked_file
from atoll.data.tables import Rows
from atoll.errors import DataError

MAX_IDX_BYTES = 4_000_000_000
_IDX_FILE = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_UNSIGNED_BYTES = 8


def open_idx(path: Path) -> dict[str, Rows] | None:
    """The parts in a folder of IDX files as MNIST is published, or in the MNIST/raw in it; None without any.

    An IDX file is two zero bytes, the type (8: unsigned bytes), the number of dimensions, each of these in 4
    bytes with the highest first, and the values (http://yann.lecun.com/exdb/mnist).

    Raises:
        DataError: a file is damaged, twice there, or without the one that belongs to it.
    """
    for folder in (path, path / "raw", path / "MNIST" / "raw") if path.is_dir() else ():
        if files := _idx_files(folder):
            splits = sorted({split for split, _ in files}, reverse=True)
            return {split: _idx_rows(files, split, folder, path) for split in splits}
    return None


def _idx_files(folder: Path) -> dict[tuple[str, str], Path]:
    """The files by (split, "images" or "labels"); one that is there compressed too is read as it is."""
    files: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if named := _IDX_FILE.fullmatch(file.name):
            files.setdefault(("train" if named[1] == "train" else "test", named[2]), file)
    return files


def _idx_rows(files: dict[tuple[str, str], Path], split: str, folder: Path, root: Path) -> Rows:
    for what in ("images", "labels"):
        if (split, what) not in files:
            raise DataError(f"{shown(folder)}: no IDX file of the {what} to {split} on, expected one")
    images, labels = files[split, "images"], files[split, "labels"]
    pixels, classes = _idx_values(checked_file(images, root), 3), _idx_values(checked_file(labels, root), 1)
    if len(pixels) != len(classes):
        raise DataError(
            f"{shown(labels)}: {len(classes)} labels, expected one for each of {len(pixels)} images"
        )
    table = pa.table(
        {
            "image": pa.array([_png(one) for one in pixels], pa.binary()),
            "label": pa.array([str(one) for one in classes.tolist()], pa.string()),
        }
    )
    return Rows(shown(images), table, lambda row: f"{shown(images)} image {row}", root, is_canonical=True)


def _idx_values(file: Path, dimensions: int) -> NDArray[np.uint8]:
    with opened(file) as stream:
        try:
            unpacked = gzip.GzipFile(fileobj=stream) if file.suffix == ".gz" else stream
            data = unpacked.read(MAX_IDX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{shown(file)}: damaged ({error}), expected gzip") from None
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        raise DataError(
            f"{shown(file)}: starts with {data[:4].hex(' ')}, expected IDX of unsigned bytes in {dimensions}"
            f" dimensions, 00 00 08 0{dimensions}"
        )
    shape = np.frombuffer(data, ">u4", dimensions, offset=4).tolist()
    if len(data) - start != prod(shape):
        shape_text = " x ".join(map(str, shape))
        raise DataError(f"{shown(file)}: {len(data) - start} values, expected {shape_text} = {prod(shape)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = BytesIO()
    # Without compression, whose bytes may differ between versions.
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()
