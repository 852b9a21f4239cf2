"""Which of the known layouts lies at a path, and its rows by split."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from math import prod
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.data import tables
from atoll.data.diagnostics import Diagnostics, opened, shown
from atoll.data.folders import checked_file, class_files, listing, resolved
from atoll.data.tables import Rows
from atoll.data.texts import read_text_file
from atoll.errors import DataError

_SPLIT_FILE = re.compile(r"(train|test|validation|val)(-\d+-of-\d+)?")
USED_SPLITS = ("train", "test")
SPLITS = (*USED_SPLITS, "validation", "val")
_EXPECTED = f"a folder per class, or one file of {', '.join(tables.SUFFIXES)}"


class NoDataError(DataError):
    """There is no data at the path, so there is nothing to inspect either."""


@contextmanager
def collecting_errors(path: Path, diagnostics: Diagnostics) -> Iterator[None]:
    """Within, what is wrong with the data at `path` is noted, unless there is none to speak of."""
    try:
        yield
    except NoDataError:
        raise
    except DataError as problem:
        diagnostics.error(problem)
    except OSError as error:
        diagnostics.error(DataError(f"{shown(error.filename or path)}: cannot be read: {error.strerror}"))


ClassReader = Callable[[Path, Path, Diagnostics], Rows]
"""Reads (shard, folder that holds the class folders) into canonical rows."""


def open_shard(
    path: Path, read_classes: ClassReader, diagnostics: Diagnostics, *, expected: str = _EXPECTED
) -> dict[str, Rows]:
    """The rows of "train" and, where there is one, of "test"; `expected` says in words what can be read."""
    if not path.exists():
        raise NoDataError(f"{shown(path)}: no such file or folder, expected {expected}")
    if path.is_dir():
        opened = _open_folder(path, read_classes, diagnostics, expected)
    else:
        file, suffix = checked_file(path, path.resolve().parent), path.suffix.lower()
        if suffix not in tables.SUFFIXES:
            raise DataError(f"{shown(path)}: format {suffix or 'unknown'!r}, expected {expected}")
        opened = {"train": tables.read_file(file, diagnostics)}
    return used_splits(opened, path, diagnostics)


def used_splits(splits: dict[str, Rows], path: Path, diagnostics: Diagnostics) -> dict[str, Rows]:
    """Those of the splits that are used, train and test; the rows of others are counted as left out.

    Raises:
        DataError: there is no train.
    """
    if "train" not in splits:
        raise DataError(f"{shown(path)}: splits {sorted(splits)}, expected train, and test if there is one")
    for name in sorted(splits.keys() - set(USED_SPLITS)):
        diagnostics.warning(f"split {shown(name)} is not used", shown(path))
        diagnostics.rows_read += splits[name].table.num_rows
        diagnostics.leave_out("of other splits than train and test", splits[name].table.num_rows)
    return {name: splits[name] for name in USED_SPLITS if name in splits}


def _open_folder(
    path: Path, read_classes: ClassReader, diagnostics: Diagnostics, expected: str
) -> dict[str, Rows]:
    entries = listing(path, path, diagnostics)
    if tables.is_saved_dataset(path):
        _check_links(path, path, diagnostics)
        return tables.read_saved(path)
    if files := [entry for entry in entries if entry.suffix.lower() in tables.SUFFIXES]:
        return {split: _read_files(path, part, diagnostics) for split, part in _by_split(path, files).items()}
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders and not any(entry.is_symlink() for entry in entries):
        contents = f"{len(entries)} files" if entries else "nothing"
        lacks = " and no class folder" if expected == _EXPECTED else ""
        raise NoDataError(f"{shown(path)}: holds {contents}{lacks}, expected {expected}")
    if _is_split(folders):
        return {split.name: _open_split(path, split, read_classes, diagnostics) for split in folders}
    return {"train": read_classes(path, path, diagnostics)}


def _is_split(folders: Sequence[Path]) -> bool:
    names = {folder.name for folder in folders}
    return "train" in names and names <= set(SPLITS)


def _open_split(root: Path, split: Path, read_classes: ClassReader, diagnostics: Diagnostics) -> Rows:
    files = [entry for entry in listing(split, root, diagnostics) if entry.suffix.lower() in tables.SUFFIXES]
    return _read_files(root, files, diagnostics) if files else read_classes(root, split, diagnostics)


def _by_split(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files called train, test or train-00000-of-00002 go by their names; otherwise there is one file."""
    if len(files) == 1:
        return {"train": list(files)}
    splits: dict[str, list[Path]] = {}
    for file in files:
        named = _SPLIT_FILE.fullmatch(file.stem.lower())
        if not named:
            names = ", ".join(shown(entry.name) for entry in files)
            raise DataError(f"{shown(path)}: files {names}, expected one, or train and test")
        splits.setdefault(named[1], []).append(file)
    return splits


def _read_files(root: Path, files: Sequence[Path], diagnostics: Diagnostics) -> Rows:
    return tables.joined([tables.read_file(checked_file(file, root), diagnostics) for file in files])


def _check_links(folder: Path, root: Path, diagnostics: Diagnostics) -> None:
    for entry in listing(folder, root, diagnostics):
        if resolved(entry, root).is_dir() and not entry.is_symlink():
            _check_links(entry, root, diagnostics)
        else:
            checked_file(entry, root)


def text_classes(root: Path, base: Path, diagnostics: Diagnostics) -> Rows:
    """The texts of `base`/CLASS/FILE."""
    texts, labels, paths = [], [], []
    for path, label in class_files(root, base, diagnostics):
        try:
            texts.append(read_text_file(path, diagnostics))
        except DataError as problem:
            diagnostics.error(problem)
            continue
        labels.append(label)
        paths.append(path)
    return _canonical("text", pa.array(texts, pa.string()), labels, paths, root)


def image_classes(root: Path, base: Path, diagnostics: Diagnostics) -> Rows:
    """The images of `base`/CLASS/FILE: their paths, not yet their bytes."""
    files = list(class_files(root, base, diagnostics))
    paths = [path for path, _ in files]
    images = pa.array([str(path.absolute()) for path in paths], pa.string())
    return _canonical("image", images, [label for _, label in files], paths, root)


def _canonical(content: str, values: pa.Array, labels: list[str], paths: list[Path], root: Path) -> Rows:
    table = pa.table({content: values, "label": pa.array(labels, pa.string())})
    return Rows(shown(root), table, lambda row: shown(paths[row]), root, is_canonical=True)


MAX_IDX_BYTES = 4_000_000_000
_IDX_FILE = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_UNSIGNED_BYTES = 8


def open_idx(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
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
