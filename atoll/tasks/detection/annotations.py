"""Shared parts of reading COCO, VOC and YOLO annotations: bounded files, image paths, rows, splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from atoll.data.diagnostics import Diagnostics, opened, shown
from atoll.data.tables import Rows
from atoll.errors import DataError

MAX_ANNOTATION_BYTES = 1_000_000_000

Part = TypeVar("Part")

Annotated = tuple[Path, list[list[float]], list[str]]
"""(the path of an image, its boxes, the class of each box)."""


def annotation_bytes(path: Path) -> bytes:
    """The content of a file of annotations.

    Raises:
        DataError: the file can't be read, or is too large.
    """
    with opened(path) as file:
        data = file.read(MAX_ANNOTATION_BYTES + 1)
    if len(data) > MAX_ANNOTATION_BYTES:
        raise DataError(f"{shown(path)}: more than {MAX_ANNOTATION_BYTES} bytes, the most that is allowed")
    return data


def annotation_lines(path: Path) -> list[str]:
    """The lines of a text file of annotations, stripped.

    Raises:
        DataError: the file can't be read, is too large, or isn't UTF-8.
    """
    try:
        return [line.strip() for line in annotation_bytes(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: byte {error.start} is not UTF-8, expected text") from None


def image_of(base: Path, name: Path, folders: Sequence[str] = ()) -> Path:
    """The path of an image: in `base`, or in one of the folders in which such images usually are."""
    places = [base / name, *(base / folder / name for folder in (*folders, "images", "JPEGImages"))]
    return next((place for place in places if place.exists()), places[0])


def rows_of(root: Path, rows: Sequence[Annotated]) -> Rows:
    """The annotated images as rows in this task's own columns."""
    table = pa.table(
        {
            "image": pa.array([str(image.absolute()) for image, _, _ in rows], pa.string()),
            "boxes": pa.array([boxes for _, boxes, _ in rows], pa.list_(pa.list_(pa.float64()))),
            "classes": pa.array([classes for _, _, classes in rows], pa.list_(pa.string())),
        }
    )
    return Rows(shown(root), table, lambda row: shown(rows[row][0]), root, is_canonical=True)


def test_part(parts: Mapping[str, Part], root: Path, diagnostics: Diagnostics) -> Part | None:
    """The test split: "test", or else "val", which such data sets often publish instead; None without."""
    if "test" in parts or "val" not in parts:
        return parts.get("test")
    diagnostics.warning("val is taken as the test part, as there is no test", shown(root))
    return parts["val"]
