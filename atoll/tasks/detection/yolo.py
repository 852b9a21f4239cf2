"""Reading YOLO folders: data.yaml names the classes and the images' folders, labels/ has one file per image.

A line of such a file is `class x y width height`: the box's centre and size as fractions of the image's, as
documented by Ultralytics. An image without a file, or with an empty one, has no objects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atoll.backbones.dense_vision import picture_size
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.folders import checked_file, listing, resolved
from atoll.data.images import IMAGE_SUFFIXES
from atoll.data.labels import class_name
from atoll.data.parsers import number_cell
from atoll.data.tables import Rows
from atoll.errors import DataError
from atoll.tasks.detection.annotations import (
    Annotated,
    annotation_bytes,
    annotation_lines,
    rows_of,
    test_part,
)

_LINE = "class, x, y, width and height as parts of the image"


def open_yolo(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    """The rows by split as data.yaml names them; without a test split, val is used. None without data.yaml.

    Raises:
        DataError: data.yaml is invalid, or a folder doesn't exist.
    """
    file = next((path / name for name in ("data.yaml", "data.yml") if (path / name).exists()), None)
    if file is None:
        return None
    settings = _yolo_settings(checked_file(file, path))
    names = _names(settings, file)
    parts = {split: settings[split] for split in ("train", "val", "test") if settings.get(split)}
    test = test_part(parts, path, diagnostics)
    if "train" not in parts:
        raise DataError(f"{shown(file)}: no train, expected the folder of its images")
    used = {"train": parts["train"]} | ({} if test is None else {"test": test})
    base = path / str(settings.get("path") or "")
    base = base if base.is_dir() and base.resolve().is_relative_to(path.resolve()) else path
    return {split: _split(folders, file, base, names, diagnostics) for split, folders in used.items()}


def _yolo_settings(file: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(annotation_bytes(file))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{shown(file)}: not valid YAML: {why}, expected names, train and val") from None
    if not isinstance(settings, dict):
        raise DataError(f"{shown(file)}: {type(settings).__name__}, expected names, train and val")
    return settings


def _names(settings: dict[str, Any], file: Path) -> dict[int, str]:
    entries = settings.get("names")
    pairs = (
        enumerate(entries)
        if isinstance(entries, list)
        else entries.items()
        if isinstance(entries, dict)
        else ()
    )
    names = {number: class_name(name, f"{shown(file)} names") for number, name in pairs}
    if not names or not all(isinstance(number, int) for number in names):
        raise DataError(
            f"{shown(file)}: names {shown(str(entries))}, expected a list of classes, or each by its number"
        )
    return names


def _split(folders: Any, file: Path, base: Path, names: dict[int, str], diagnostics: Diagnostics) -> Rows:
    rows: list[Annotated] = []
    for name in folders if isinstance(folders, list) else [folders]:
        folder = _folder(str(name), file, base)
        for image in listing(folder, file.parent, diagnostics):
            if image.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            try:
                rows.append(_image(checked_file(image, file.parent), file.parent, names))
            except DataError as problem:
                diagnostics.error(problem)
    return rows_of(base, rows)


def _folder(name: str, file: Path, base: Path) -> Path:
    """The path of a folder of images; some exports write `../train/images` and mean `train/images`."""
    for place in (base / name, base / name.removeprefix("../"), file.parent / name.removeprefix("../")):
        if place.is_dir():
            return resolved(place, file.parent)
    raise DataError(f"{shown(file)}: {shown(name)} is no folder of images beside it, expected one")


def _image(image: Path, root: Path, names: dict[int, str]) -> Annotated:
    labels = _labels_of(image)
    boxes: list[list[float]] = []
    classes: list[str] = []
    lines = annotation_lines(checked_file(labels, root)) if labels.exists() else []
    size = picture_size({"bytes": None, "path": str(image)}) if any(lines) else (0, 0)
    for number, line in enumerate(lines, start=1):
        if line:
            box, at = _box(line, f"{shown(labels)} line {number}", size)
            if at not in names:
                raise DataError(
                    f"{shown(labels)} line {number}: class {at}, expected one of {sorted(names)} in data.yaml"
                )
            boxes.append(box)
            classes.append(names[at])
    return image, boxes, classes


def _labels_of(image: Path) -> Path:
    """The path of an image's labels: the last folder `images` is replaced by `labels`, as in Ultralytics.

    If there is no such folder, labels are beside the image.
    """
    parts = list(image.with_suffix(".txt").parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts)


def _box(line: str, where: str, size: tuple[int, int]) -> tuple[list[float], int]:
    cells = line.split()
    if len(cells) != 5:
        raise DataError(f"{where}: {len(cells)} values, expected {_LINE}")
    at, x, y, width, height = (number_cell(cell, where) for cell in cells)
    if not at.is_integer() or not all(0 <= value <= 1 for value in (x, y, width, height)):
        raise DataError(f"{where}: {shown(line)!r}, expected {_LINE}")
    left, top = (x - width / 2) * size[0], (y - height / 2) * size[1]
    return [left, top, left + width * size[0], top + height * size[1]], int(at)
