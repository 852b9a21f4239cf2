"""Which of the known layouts lies at a path, and its rows by split."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from atoll.data import tables
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.folders import checked_file, class_files, listing, resolved
from atoll.data.tables import Rows
from atoll.data.texts import read_text_file
from atoll.errors import DataError

_SPLIT_FILE = re.compile(r"(train|test|validation|val)(-\d+-of-\d+)?")
_SPLIT_SHARD = re.compile(r"(?:.*[-_])?(train|test|validation|val)(?:[-_]?\d+)?(?:-of-\d+)?")
"""What shards of WebDataset are called, such as imagenet-train-000012.tar."""
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
    if files := _tables_in(entries):
        return {split: _read_files(path, part, diagnostics) for split, part in _by_split(path, files).items()}
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders and not any(entry.is_symlink() for entry in entries):
        contents = f"{len(entries)} files" if entries else "nothing"
        lacks = " and no class folder" if expected == _EXPECTED else ""
        raise NoDataError(f"{shown(path)}: holds {contents}{lacks}, expected {expected}")
    if _is_split(folders):
        return {split.name: _open_split(path, split, read_classes, diagnostics) for split in folders}
    return {"train": read_classes(path, path, diagnostics)}


def _tables_in(entries: Sequence[Path]) -> list[Path]:
    """The files of rows among them; a tar file beside these or beside folders is what they come from."""
    files = [entry for entry in entries if entry.suffix.lower() in tables.SUFFIXES]
    others = [file for file in files if file.suffix.lower() != ".tar"]
    return others if others or any(entry.is_dir() for entry in entries) else files


def _is_split(folders: Sequence[Path]) -> bool:
    names = {folder.name for folder in folders}
    return "train" in names and names <= set(SPLITS)


def _open_split(root: Path, split: Path, read_classes: ClassReader, diagnostics: Diagnostics) -> Rows:
    files = _tables_in(listing(split, root, diagnostics))
    return _read_files(root, files, diagnostics) if files else read_classes(root, split, diagnostics)


def _by_split(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files called train, test or train-00000-of-00002 go by their names; otherwise there is one file.

    Shards of WebDataset may have longer names, and are all to train on where no name says a split.
    """
    is_sharded = all(file.suffix.lower() == ".tar" for file in files)
    pattern = _SPLIT_SHARD if is_sharded else _SPLIT_FILE
    named = [pattern.fullmatch(file.stem.lower()) for file in files]
    if len(files) == 1 or (is_sharded and not any(named)):
        return {"train": sorted(files)}
    splits: dict[str, list[Path]] = {}
    for file, match in zip(files, named, strict=True):
        if not match:
            names = ", ".join(shown(entry.name) for entry in files)
            raise DataError(f"{shown(path)}: files {names}, expected one, or train and test")
        splits.setdefault(match[1], []).append(file)
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
