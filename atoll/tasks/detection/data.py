"""Data of object detection: images with boxes, from tables, COCO's JSON, VOC's XML or YOLO's text files.

A box is [x1, y1, x2, y2] in pixels from the image's upper left corner; x2 and y2 are past its last pixel.
COCO's crowds, which are regions and no boxes, are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from atoll.backbones.dense_vision import picture_size
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts, Diagnostics, shown, those_left
from atoll.data.folders import checked_file
from atoll.data.images import decode
from atoll.data.labels import class_name
from atoll.data.layouts import SPLITS, USED_SPLITS
from atoll.data.parsers import list_cell, number_cell
from atoll.data.schema import Schema, SchemaField, picture_field
from atoll.data.tables import SUFFIXES, Rows
from atoll.errors import DataError
from atoll.tasks.detection.annotations import annotation_bytes, image_of, rows_of, test_part
from atoll.tasks.detection.voc import every_voc, open_voc
from atoll.tasks.detection.yolo import open_yolo

_TOLERATED = 1.0
"""The number of pixels by which a box may exceed its image, because of rounding."""

_numbers = list_cell(number_cell)


def box_cell(cell: Any, where: str) -> list[float]:
    """The box in a cell, [x1, y1, x2, y2].

    Raises:
        DataError: the cell is no list of four numbers, or the box is empty.
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
    """The rows by split of COCO, VOC or YOLO data; COCO and VOC also under train/ and test/; else None."""
    if not path.is_dir():
        is_coco = path.suffix.lower() == ".json" and path.is_file()
        return {"train": _coco(path, path.parent, diagnostics)} if is_coco else None
    if (path / "data.jsonl").exists():
        return None
    for whole in (_coco_splits, open_yolo, open_voc):
        if (parts := whole(path, diagnostics)) is not None:
            return parts
    if (reader := _reader(path)) is not None:
        return {"train": reader(path, diagnostics)}
    splits = {split: _reader(path / split) for split in SPLITS if (path / split).is_dir()}
    if splits.get("train") is None:
        return None
    return {
        split: read(path / split, diagnostics if split in USED_SPLITS else Diagnostics())
        for split, read in splits.items()
        if read is not None
    }


_OF_SPLIT = re.compile(r"instances_(train|test|val)([a-z]*\d*)\.json")


def _coco_splits(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    """The rows by split of COCO's own layout: annotations/instances_train2017.json, images in train2017/."""
    folder = path / "annotations"
    names = sorted(file.name for file in folder.glob("*.json")) if folder.is_dir() else []
    named = [match for name in names if (match := _OF_SPLIT.fullmatch(name))]
    if not named:
        return None
    files: dict[str, Path] = {}
    for match in named:
        if match[1] in files:
            both = f"{shown(files[match[1]].name)} and {shown(match[0])}"
            raise DataError(f"{shown(folder)}: {both}, expected one file for {match[1]}")
        files[match[1]] = folder / match[0]
    test = test_part(files, path, diagnostics)
    parts = {"train": files.get("train"), "test": test}
    rows = {split: _coco(file, path, diagnostics) for split, file in parts.items() if file is not None}
    if "val" in files and files["val"] is not test:
        rows["val"] = _coco(files["val"], path, Diagnostics())
    return rows


def _reader(base: Path) -> Callable[[Path, Diagnostics], Rows] | None:
    """The function that reads the annotations in a folder; None if there are none."""
    places = [folder for folder in (base, base / "annotations") if folder.is_dir()]
    files = sorted(file for folder in places for file in folder.glob("*.json") if _is_coco_name(file.name))
    if len(files) > 1:
        names = ", ".join(shown(file.name) for file in files)
        raise DataError(f"{shown(base)}: annotations {names}, expected one file, or train/ and test/")
    if files:
        return lambda folder, diagnostics: _coco(files[0], folder, diagnostics)
    has_xml = (base / "Annotations").is_dir() or next(base.glob("*.xml"), None) is not None
    return every_voc if has_xml else None


def _is_coco_name(name: str) -> bool:
    return name in ("annotations.json", "coco.json") or name.endswith("_coco.json") or "instances_" in name


def _coco(file: Path, base: Path, diagnostics: Diagnostics) -> Rows:
    """The images listed in a COCO file, each with its boxes, possibly none."""
    try:
        written = json.loads(annotation_bytes(checked_file(file, base)))
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
    split = _OF_SPLIT.fullmatch(file.name)
    beside = () if split is None else (f"{split[1]}{split[2]}", f"images/{split[1]}{split[2]}", split[1])
    paths = {image: image_of(base, Path(name), beside) for image, name in images.items()}
    return rows_of(base, [(paths[image], boxes[image], classes[image]) for image in images])


def _counted(annotations: int, boxes: int) -> Counts:
    crowds = {"crowds, without a box of their own": annotations - boxes}
    return Counts("annotations", annotations, boxes, those_left(crowds))


def _nothing_to_find(dataset: Dataset) -> str | None:
    """A remark if no picture has a box: most often the annotations are in an unexpected place."""
    if any(dataset.cells("boxes")):
        return None
    return f"none of the {len(dataset)} pictures has a box; if some should, look where their annotations lie"


BOXES = Schema(
    (
        picture_field(decode),
        SchemaField(
            "boxes", list_cell(box_cell), pa.list_(pa.list_(pa.float64())), ("bboxes", "bbox", "box")
        ),
        SchemaField(
            "classes", list_cell(class_name), pa.list_(pa.string()), ("labels", "names", "categories")
        ),
    ),
    open_layout=_open,
    layout="COCO's JSON, VOC's XML or YOLO's text files beside the images, or one file of"
    f" {', '.join(SUFFIXES)}",
    check_row=_fits,
    odd=_nothing_to_find,
)
