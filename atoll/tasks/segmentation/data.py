"""Data of segmentation: images with masks, pictures of the same size whose pixels are class indices."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from atoll.backbones.dense_vision import picture_size
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.folders import checked_file, listing
from atoll.data.images import decode
from atoll.data.layouts import SPLITS, USED_SPLITS
from atoll.data.schema import FILE, Schema, SchemaField, file_bytes, picture_field
from atoll.data.tables import SUFFIXES, Rows
from atoll.errors import DataError

IGNORED = 255
"""The value of an unlabelled pixel in a mask."""


def read_mask(data: bytes, where: str) -> NDArray[np.uint8]:
    """The class indices of a mask, uint8, [height, width]; with a palette, its indices and not its colours.

    Raises:
        DataError: the mask isn't a losslessly compressed picture with one 8-bit channel.
    """
    try:
        with Image.open(BytesIO(data), formats=("PNG", "BMP", "GIF", "TIFF")) as image:
            if image.mode not in ("L", "P", "1"):
                raise DataError(
                    f"{where}: mask of mode {image.mode}, expected one 8-bit channel of class indices"
                )
            return np.asarray(image).astype(np.uint8)
    except UnidentifiedImageError:
        raise DataError(f"{where}: no mask, expected a PNG whose pixels are class indices") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = str(error).splitlines()[0]
        raise DataError(f"{where}: damaged mask: {why}; expected one that decodes") from None


def _same_size(parts: Mapping[str, Any], where: str) -> None:
    image, mask = picture_size(parts["image"]), picture_size(parts["mask"])
    if image != mask:
        raise DataError(
            f"{where}: mask of {mask[0]} x {mask[1]} pixels, expected {image[0]} x {image[1]} as the image"
        )


def _folders(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    """The rows of the folders `images/` and `masks/`, also under train/ and test/; None without them."""
    if _has_both(path):
        return {"train": _paired(path, path, diagnostics)}
    splits = [split for split in SPLITS if _has_both(path / split)]
    if "train" not in splits:
        return None
    return {
        split: _paired(path, path / split, diagnostics if split in USED_SPLITS else Diagnostics())
        for split in splits
    }


def _has_both(base: Path) -> bool:
    return (base / "images").is_dir() and (base / "masks").is_dir()


def _paired(root: Path, base: Path, diagnostics: Diagnostics) -> Rows:
    images, masks = (_by_stem(base / name, root, diagnostics) for name in ("images", "masks"))
    for stem in sorted(set(images) ^ set(masks)):
        has, lacks = ("image", "mask") if stem in images else ("mask", "image")
        lone = images.get(stem) or masks[stem]
        diagnostics.error(
            DataError(f"{shown(lone)}: {has} without {lacks}, expected {base.name}/{lacks}s/{stem}.*")
        )
    stems = sorted(set(images) & set(masks))
    columns = {
        name: pa.array([str(files[stem].absolute()) for stem in stems], pa.string())
        for name, files in (("image", images), ("mask", masks))
    }
    return Rows(
        shown(root), pa.table(columns), lambda row: shown(images[stems[row]]), root, is_canonical=True
    )


def _by_stem(folder: Path, root: Path, diagnostics: Diagnostics) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for path in listing(folder, root, diagnostics):
        try:
            checked_file(path, root)
            if path.stem in by_stem:
                raise DataError(f"{shown(path)}: a second file called {shown(path.stem)}, expected one")
            by_stem[path.stem] = path
        except DataError as problem:
            diagnostics.error(problem)
    return by_stem


def _one_class_alone(dataset: Dataset) -> str | None:
    """A remark if all masks have a single class; often they are white on black, and 255 means the object."""
    classes: set[int] = set()
    for cell in dataset.cells("mask"):
        classes.update(np.unique(read_mask(file_bytes(cell, "mask"), "mask")).tolist())
        if len(classes - {IGNORED}) > 1:
            return None
    known = ", ".join(map(str, classes - {IGNORED})) or "none"
    if IGNORED not in classes:
        return f"the only class in all masks is {known}"
    return (
        f"the only class in all masks is {known}, for {IGNORED} stands for pixels that are ignored;"
        " objects drawn in white need the value 1"
    )


MASKS = Schema(
    (
        picture_field(decode),
        SchemaField("mask", read_mask, FILE, ("masks", "segmentation", "annotation", "label"), file=True),
    ),
    open_layout=_folders,
    layout=f"images/ and masks/ with equal names, or one file of {', '.join(SUFFIXES)}",
    check_row=_same_size,
    odd=_one_class_alone,
)


def highest_class(cell: Mapping[str, Any]) -> int:
    """The highest class index in a mask; -1 if every pixel is ignored."""
    mask = read_mask(file_bytes(cell, "mask"), "mask")
    known = mask[mask != IGNORED]
    return int(known.max()) if known.size else -1
