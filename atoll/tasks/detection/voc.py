"""Reading Pascal VOC in its published form: Annotations/*.xml, JPEGImages/, lists in ImageSets/Main/*.txt.

VOC counts pixels from 1 and includes a box's last pixel, so 1 is subtracted from xmin and ymin.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.folders import checked_file, listing
from atoll.data.labels import class_name
from atoll.data.parsers import number_cell
from atoll.data.tables import Rows
from atoll.errors import DataError
from atoll.tasks.detection.annotations import (
    Annotated,
    annotation_bytes,
    annotation_lines,
    image_of,
    rows_of,
    test_part,
)

_LISTS = ("train", "val", "trainval", "test")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def open_voc(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    """The rows by split that ImageSets/Main lists, of a folder such as VOC2012 or a VOCdevkit around it.

    With test.txt, the training split is trainval.txt (or train.txt); without, val.txt is the test split. None
    if there are no lists.

    Raises:
        DataError: there are several years, or a list names a missing file.
    """
    base = _year(path)
    if base is None:
        return None
    lists = ((name, base / "ImageSets" / "Main" / f"{name}.txt") for name in _LISTS)
    parts = {name: file for name, file in lists if file.exists()}
    if "trainval" in parts and ("test" in parts or "train" not in parts):
        parts["train"] = parts["trainval"]
        parts.pop("val", None)
    parts.pop("trainval", None)
    if "train" not in parts:
        return {"train": every_voc(base, diagnostics)} if base != path else None
    test = test_part(parts, path, diagnostics)
    used = {"train": parts["train"]} | ({} if test is None else {"test": test})
    names = {split: _listed(file, base, diagnostics) for split, file in used.items()}
    rest = {file.stem for file in (base / "Annotations").glob("*.xml")}.difference(*names.values())
    diagnostics.rows_read += len(rest)
    if rest:
        diagnostics.leave_out("in no list of ImageSets/Main that is used", len(rest))
    return {split: _read(names_of_split, base, diagnostics) for split, names_of_split in names.items()}


def _year(path: Path) -> Path | None:
    """The folder that contains Annotations: `path`, or the only such folder in it or its VOCdevkit."""
    if (path / "Annotations").is_dir():
        return path
    outer = path / "VOCdevkit" if (path / "VOCdevkit").is_dir() else path
    folders = sorted(folder.parent for folder in outer.glob("VOC*/Annotations") if folder.is_dir())
    if len(folders) > 1:
        years = ", ".join(shown(folder.name) for folder in folders)
        raise DataError(f"{shown(outer)}: {years}, expected one of them as the data")
    return folders[0] if folders else None


def _listed(file: Path, base: Path, diagnostics: Diagnostics) -> list[str]:
    """The names of the images in a list, one per line, possibly followed by a number."""
    listed = []
    for number, line in enumerate(annotation_lines(checked_file(file, base)), start=1):
        name = line.split()[0] if line else ""
        if name and (base / "Annotations" / f"{name}.xml").exists():
            listed.append(name)
        elif name:
            diagnostics.error(
                DataError(f"{shown(file)} line {number}: no Annotations/{shown(name)}.xml, expected one")
            )
    return listed


def _read(names: list[str], base: Path, diagnostics: Diagnostics) -> Rows:
    rows = []
    for name in names:
        try:
            rows.append(_voc_file(checked_file(base / "Annotations" / f"{name}.xml", base), base))
        except DataError as problem:
            diagnostics.error(problem)
    return rows_of(base, rows)


def every_voc(base: Path, diagnostics: Diagnostics) -> Rows:
    """The annotated images of all XML files in a folder."""
    folder = base / "Annotations" if (base / "Annotations").is_dir() else base
    rows = []
    for path in listing(folder, base, diagnostics):
        if path.suffix.lower() != ".xml":
            continue
        try:
            rows.append(_voc_file(checked_file(path, base), base))
        except DataError as problem:
            diagnostics.error(problem)
    return rows_of(base, rows)


def _voc_file(path: Path, base: Path) -> Annotated:
    data = annotation_bytes(path)
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
    return beside if beside.exists() else image_of(base, Path(name)), boxes, classes
