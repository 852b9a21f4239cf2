"""Images with boxes: rows of a file, COCO's JSON, or VOC's XML beside the images.

A box is [x1, y1, x2, y2] in pixels from the image's upper left corner; x2 and y2 are past its last pixel.
VOC counts pixels from 1 and names the last one, so 1 is taken from its first two. Objects that COCO calls
crowds, which are regions and no boxes, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa

from atoll.backbones.dense_vision import picture_size
from atoll.data.diagnostics import Counts, Diagnostics, opened, shown, those_left
from atoll.data.folders import checked_file, listing
from atoll.data.images import decode, seen_picture
from atoll.data.labels import class_name
from atoll.data.layouts import SPLITS, USED_SPLITS
from atoll.data.parsers import list_cell, number_cell
from atoll.data.schema import FILE, Schema, SchemaField
from atoll.data.tables import SUFFIXES, Rows
from atoll.errors import DataError

MAX_ANNOTATION_BYTES = 1_000_000_000
_TOLERATED = 1.0
"""Pixels that a box may reach out of its image, as rounding makes them do."""

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_numbers = list_cell(number_cell)


def box_cell(cell: Any, where: str) -> list[float]:
    """x1, y1, x2, y2 of a box that isn't empty.

    Raises:
        DataError: it is something else.
    """
    box: list[float] = _numbers(cell, where)
    if len(box) != 4:
        raise DataError(f"{where}: a box of {len(box)} numbers, expected x1, y1, x2, y2")
    if not (box[0] < box[2] and box[1] < box[3]):
        raise DataError(f"{where}: box {box} is empty, expected x1 < x2 and y1 < y2")
    return box


def _fits(parts: Mapping[str, Any], where: str) -> None:
    boxes, classes = parts["boxes"], parts["classes"]
    if len(boxes) != len(classes):
        raise DataError(f"{where}: {len(boxes)} boxes and {len(classes)} classes, expected a class a box")
    width, height = picture_size(parts["image"])
    for box in boxes:
        if min(box) < -_TOLERATED or box[2] > width + _TOLERATED or box[3] > height + _TOLERATED:
            raise DataError(f"{where}: box {box} outside the image, expected it within {width} x {height}")


def _open(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    """COCO or VOC, also under train/ and test/."""
    if not path.is_dir():
        is_coco = path.suffix.lower() == ".json" and path.is_file()
        return {"train": _coco(path, path.parent, diagnostics)} if is_coco else None
    if (path / "data.jsonl").exists():
        return None
    if (found := _reader(path)) is not None:
        return {"train": found(path, diagnostics)}
    splits = {split: _reader(path / split) for split in SPLITS if (path / split).is_dir()}
    if splits.get("train") is None:
        return None
    return {
        split: read(path / split, diagnostics if split in USED_SPLITS else Diagnostics())
        for split, read in splits.items()
        if read is not None
    }


def _reader(base: Path) -> Callable[[Path, Diagnostics], Rows] | None:
    """What reads the annotations in a folder; None where there are none."""
    places = [folder for folder in (base, base / "annotations") if folder.is_dir()]
    files = sorted(file for folder in places for file in folder.glob("*.json") if _is_coco_name(file.name))
    if len(files) > 1:
        names = ", ".join(shown(file.name) for file in files)
        raise DataError(f"{shown(base)}: annotations {names}, expected one file, or train/ and test/")
    if files:
        return lambda folder, diagnostics: _coco(files[0], folder, diagnostics)
    has_xml = (base / "Annotations").is_dir() or next(base.glob("*.xml"), None) is not None
    return _voc if has_xml else None


def _is_coco_name(name: str) -> bool:
    return name in ("annotations.json", "coco.json") or name.endswith("_coco.json") or "instances_" in name


def _small_enough(path: Path) -> bytes:
    with opened(path) as file:
        data = file.read(MAX_ANNOTATION_BYTES + 1)
    if len(data) > MAX_ANNOTATION_BYTES:
        raise DataError(f"{shown(path)}: more than {MAX_ANNOTATION_BYTES} bytes, the most that is allowed")
    return data


def _coco(file: Path, base: Path, diagnostics: Diagnostics) -> Rows:
    """The images that the file lists, each with its boxes, which may be none."""
    try:
        written = json.loads(_small_enough(checked_file(file, base)))
        names = {one["id"]: one["name"] for one in written["categories"]}
        images = {one["id"]: str(one["file_name"]) for one in written["images"]}
        annotations = written["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{shown(file)}: {type(error).__name__} {error}, expected COCO's images, annotations, categories"
        ) from None
    boxes: dict[Any, list[list[float]]] = {image: [] for image in images}
    classes: dict[Any, list[str]] = {image: [] for image in images}
    for number, one in enumerate(annotations):
        where = f"{shown(file)} annotation {number}"
        try:
            if one.get("iscrowd"):
                diagnostics.warning("crowds, which have no box of their own, are left out", where)
                continue
            x, y, width, height = _numbers(one["bbox"], where)
            boxes[one["image_id"]].append([x, y, x + width, y + height])
            classes[one["image_id"]].append(names[one["category_id"]])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            diagnostics.error(
                DataError(
                    f"{where}: {error}, expected image_id, category_id of the file's, bbox of 4 numbers"
                )
            )
        except DataError as problem:
            diagnostics.error(problem)
    diagnostics.counts.append(_counted(len(annotations), sum(map(len, boxes.values()))))
    found = {image: _image_of(base, Path(name)) for image, name in images.items()}
    rows = [(found[image], boxes[image], classes[image]) for image in images]
    return _rows(base, rows, lambda row: shown(rows[row][0]))


def _counted(annotations: int, boxes: int) -> Counts:
    crowds = {"crowds, without a box of their own": annotations - boxes}
    return Counts("annotations", annotations, boxes, those_left(crowds))


def _image_of(base: Path, name: Path) -> Path:
    """Where an image lies: beside the annotations, or in the folder that is usual for it."""
    places = [base / name, base / "images" / name, base / "JPEGImages" / name]
    return next((place for place in places if place.exists()), places[0])


def _voc(base: Path, diagnostics: Diagnostics) -> Rows:
    """Every XML file's image, with its boxes."""
    folder = base / "Annotations" if (base / "Annotations").is_dir() else base
    rows = []
    for path in listing(folder, base, diagnostics):
        if path.suffix.lower() != ".xml":
            continue
        try:
            rows.append(_voc_file(checked_file(path, base), base))
        except DataError as problem:
            diagnostics.error(problem)
    return _rows(base, rows, lambda row: shown(rows[row][0]))


def _voc_file(path: Path, base: Path) -> tuple[Path, list[list[float]], list[str]]:
    data = _small_enough(path)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise DataError(f"{shown(path)}: declares entities, expected plain VOC XML")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{shown(path)}: {error}, expected VOC XML") from None
    name = root.findtext("filename")
    if not name:
        raise DataError(f"{shown(path)}: no filename, expected the image's")
    boxes, classes = [], []
    for number, one in enumerate(root.findall("object")):
        where = f"{shown(path)} object {number}"
        corners = [number_cell(one.findtext(f"bndbox/{corner}"), where) for corner in _CORNERS]
        boxes.append([corners[0] - 1, corners[1] - 1, *corners[2:]])
        classes.append(class_name(one.findtext("name"), where))
    beside = path.parent / name
    return beside if beside.exists() else _image_of(base, Path(name)), boxes, classes


def _rows(
    root: Path, rows: list[tuple[Path, list[list[float]], list[str]]], where: Callable[[int], str]
) -> Rows:
    table = pa.table(
        {
            "image": pa.array([str(image.absolute()) for image, _, _ in rows], pa.string()),
            "boxes": pa.array([boxes for _, boxes, _ in rows], pa.list_(pa.list_(pa.float64()))),
            "classes": pa.array([classes for _, _, classes in rows], pa.list_(pa.string())),
        }
    )
    return Rows(shown(root), table, where, root, is_canonical=True)


BOXES = Schema(
    (
        SchemaField(
            "image",
            decode,
            FILE,
            ("img", "file", "file_name", "path", "picture", "photo"),
            file=True,
            picture=seen_picture,
        ),
        SchemaField(
            "boxes", list_cell(box_cell), pa.list_(pa.list_(pa.float64())), ("bboxes", "bbox", "box")
        ),
        SchemaField(
            "classes", list_cell(class_name), pa.list_(pa.string()), ("labels", "names", "categories")
        ),
    ),
    open_layout=_open,
    layout=f"COCO's JSON or VOC's XML beside the images, or one file of {', '.join(SUFFIXES)}",
    check_row=_fits,
)
