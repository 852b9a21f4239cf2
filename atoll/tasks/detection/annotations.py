"""What COCO's, VOC's and YOLO's annotations have in common: bounded files, where images lie, rows, splits."""

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
"""An image, its boxes, and the class of each."""


def annotation_bytes(path: Path) -> bytes:
    """A file of annotations.

    Raises:
        DataError: it can't be read, or is too large.
    """
    with opened(path) as file:
        data = file.read(MAX_ANNOTATION_BYTES + 1)
    if len(data) > MAX_ANNOTATION_BYTES:
        raise DataError(f"{shown(path)}: more than {MAX_ANNOTATION_BYTES} bytes, the most that is allowed")
    return data


def annotation_lines(path: Path) -> list[str]:
    """The lines of a text file of annotations, stripped.

    Raises:
        DataError: it isn't UTF-8.
    """
    try:
        return [line.strip() for line in annotation_bytes(path).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: byte {error.start} is not UTF-8, expected text") from None


def image_of(base: Path, name: Path, folders: Sequence[str] = ()) -> Path:
    """Where an image lies: beside the annotations, or in a folder that is usual for it."""
    places = [base / name, *(base / folder / name for folder in (*folders, "images", "JPEGImages"))]
    return next((place for place in places if place.exists()), places[0])


def rows_of(root: Path, rows: Sequence[Annotated]) -> Rows:
    """The images with their boxes as canonical rows."""
    table = pa.table(
        {
            "image": pa.array([str(image.absolute()) for image, _, _ in rows], pa.string()),
            "boxes": pa.array([boxes for _, boxes, _ in rows], pa.list_(pa.list_(pa.float64()))),
            "classes": pa.array([classes for _, _, classes in rows], pa.list_(pa.string())),
        }
    )
    return Rows(shown(root), table, lambda row: shown(rows[row][0]), root, is_canonical=True)


def test_part(parts: Mapping[str, Part], root: Path, diagnostics: Diagnostics) -> Part | None:
    """The part to test on: "test", or "val" where there is none, which these sets publish in its place."""
    if "test" in parts or "val" not in parts:
        return parts.get("test")
    diagnostics.warning("val is taken as the test part, as there is no test", shown(root))
    return parts["val"]
