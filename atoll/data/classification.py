"""Read one client's shard of texts or images, whatever form it has, and every fault in it told at once.

A shard is a folder per class (also under train/ and test/), a CSV, TSV, JSON Lines or Parquet file, a
saved Hugging Face dataset, or a folder that holds one such file or train and test. Nothing is written
beside it. Texts from folders, CSV and JSON Lines are held in memory; Parquet and saved datasets are
memory-mapped; images that are files stay files and are read when they are used.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from atoll.data.archives.idx import open_idx
from atoll.data.columns import (
    DEFAULT_COLUMNS,
    Columns,
    column_name,
    image_column,
    label_values,
    other_columns,
    text_column,
)
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts, Diagnostics, shown
from atoll.data.folders import checked_file
from atoll.data.images import Depth, decode, image_bytes, remark, seen_picture
from atoll.data.labels import alike, class_name
from atoll.data.layouts import (
    collecting_errors,
    image_classes,
    open_shard,
    text_classes,
    used_splits,
)
from atoll.data.tables import Rows
from atoll.data.texts import checked_text
from atoll.errors import ConfigError, DataError

LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class Table:
    """One shard in canonical columns: `text` or `image`, `label`, and any other scalar ones.

    `image` is a struct of `bytes` and `path`, one of them null: `atoll.data.images.image_bytes` reads either.
    `label` is a class name. `notes` are what the owner of the data should know, one line each,
    and `counts` how much was read and is used.
    """

    train: Dataset
    test: Dataset | None
    notes: tuple[str, ...]
    counts: tuple[Counts, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What `atoll check` tells of a shard. Counts are of readable examples; a size is of the content."""

    train: Mapping[str, int]
    test: Mapping[str, int]
    sizes: str
    bad: int
    problems: tuple[str, ...]
    duplicates: int
    notes: tuple[str, ...]
    class_counts: str = "class"
    counts: tuple[Counts, ...] = ()
    """How much was read and is used; nothing where there are bad examples."""


@dataclass(frozen=True, slots=True)
class _Example:
    """What is remembered of one readable example: its content's hash, its class and its size."""

    digest: bytes
    label: str
    size: tuple[int, ...]


@dataclass(frozen=True)
class _Split:
    """The canonical columns of a split, and what is remembered of its readable rows."""

    columns: dict[str, pa.ChunkedArray]
    examples: list[_Example]


@dataclass(frozen=True)
class _Kind:
    """How texts differ from images, for reading."""

    role: str
    read_classes: Callable[[Path, Path, Diagnostics], Rows]
    column: Callable[[Rows, str], pa.ChunkedArray]
    check: Callable[[Any, Rows, str, Depth | None, Diagnostics], tuple[bytes, tuple[int, ...]]]
    sizes: Callable[[tuple[int, ...]], str]


def read_texts(path: Path, columns: Columns = DEFAULT_COLUMNS) -> Table:
    """The texts and labels at `path`; the first bad example, and how many there are, is a `DataError`."""
    return _read(path, _TEXTS, columns)


def read_images(path: Path, columns: Columns = DEFAULT_COLUMNS) -> Table:
    """The images and labels at `path`, each image decoded once to see that it can be; errors as for texts."""
    return _read(path, _IMAGES, columns)


def inspect(path: Path, task_name: str, columns: Columns = DEFAULT_COLUMNS) -> Findings:
    """What is at `path`, good and bad; raises only if there is nothing to look at."""
    if task_name not in _KINDS:
        raise ConfigError(f"task {task_name!r}: expected one of {', '.join(_KINDS)}")
    diagnostics = Diagnostics()
    kind = _KINDS[task_name]
    examples = {split: part.examples for split, part in _gather(path, kind, columns, diagnostics).items()}
    if not diagnostics.problems:
        _check_filled(examples, path)
    return _findings(examples, kind, diagnostics)


def example_keys(table: Dataset) -> list[bytes]:
    """A 32-byte key for each example, from its content and label alone: not its path or place."""
    is_image = "image" in table.column_names
    contents = map(image_bytes, table.cells("image")) if is_image else map(str.encode, table.cells("text"))
    return [_key(content, label) for content, label in zip(contents, table.cells("label"), strict=True)]


def _key(content: bytes, label: str) -> bytes:
    # The length keeps content and label apart.
    return hashlib.sha256(len(content).to_bytes(8, "little") + content + label.encode()).digest()


def table_of(splits: Mapping[str, pa.Table]) -> Table:
    """Splits that are canonical already, and trusted: their images are not decoded."""
    diagnostics = Diagnostics()
    examples = {split: _trusted(part) for split, part in splits.items()}
    _remark_all(examples, diagnostics)
    data = {split: Dataset(part) for split, part in splits.items()}
    return Table(data["train"], data.get("test"), diagnostics.notes)


def _trusted(part: pa.Table) -> list[_Example]:
    cells = _values(part.column("image" if "image" in part.column_names else "text"))
    contents = (cell if isinstance(cell, bytes) else image_bytes(cell) for cell in cells)
    labels = part.column("label").to_pylist()
    return [
        _Example(hashlib.sha256(content).digest(), label, ())
        for content, label in zip(contents, labels, strict=True)
    ]


# Reading


def _read(path: Path, kind: _Kind, columns: Columns) -> Table:
    diagnostics = Diagnostics()
    splits = _gather(path, kind, columns, diagnostics)
    diagnostics.close()
    examples = {split: part.examples for split, part in splits.items()}
    _check_filled(examples, path)
    _remark_all(examples, diagnostics)
    data = {split: Dataset(pa.table(part.columns)) for split, part in splits.items()}
    counts = diagnostics.counts_of(sum(map(len, examples.values())))
    return Table(data["train"], data.get("test"), diagnostics.notes, counts)


def _gather(path: Path, kind: _Kind, columns: Columns, diagnostics: Diagnostics) -> dict[str, _Split]:
    """The splits, whole only if no problem was noted."""
    splits: dict[str, _Split] = {}
    with collecting_errors(path, diagnostics):
        images = open_idx(path) if kind.role == "image" else None
        opened = used_splits(images, path, diagnostics) if images else None
        for name, rows in (opened or open_shard(path, kind.read_classes, diagnostics)).items():
            diagnostics.rows_read += rows.table.num_rows
            splits[name] = _split(rows, kind, columns, diagnostics)
    return splits


def _check_filled(examples: Mapping[str, list[_Example]], path: Path) -> None:
    for split, rows in examples.items():
        if not rows:
            raise DataError(f"{shown(path)}: no examples to {split} on, expected at least one")


def _split(rows: Rows, kind: _Kind, columns: Columns, diagnostics: Diagnostics) -> _Split:
    if diagnostics.problems and not rows.table.num_rows:
        return _Split({}, [])
    content_name = column_name(rows, kind.role, getattr(columns, kind.role))
    label_name = column_name(rows, "label", columns.label)
    if content_name == label_name:
        raise DataError(
            f"{rows.name}: column {label_name!r} as both {kind.role} and label, expected two columns"
        )
    content = kind.column(rows, content_name)
    examples = list(_checked(rows, content, label_name, kind, columns.depth, diagnostics))
    labels = pa.chunked_array([pa.array([example.label for example in examples], pa.string())])
    others = other_columns(rows, (content_name, label_name), kind.role, diagnostics)
    if columns.depth is not None and kind.role == "image" and not diagnostics.problems:
        content = _at_depth(content, columns.depth)
    return _Split({kind.role: content, "label": labels, **others}, examples)


def _checked(
    rows: Rows,
    content: pa.ChunkedArray,
    label_name: str,
    kind: _Kind,
    depth: Depth | None,
    diagnostics: Diagnostics,
) -> Iterator[_Example]:
    names = rows.class_names.get(label_name)
    labels = label_values(rows, label_name)
    for row, (cell, label) in enumerate(zip(_values(content), labels, strict=True)):
        where = rows.where(row)
        try:
            digest, size = kind.check(cell, rows, where, depth, diagnostics)
            yield _Example(digest, class_name(label, where, names), size)
        except DataError as problem:
            diagnostics.error(problem if str(problem).startswith(where) else DataError(f"{where}: {problem}"))


def _values(column: pa.ChunkedArray) -> Iterator[Any]:
    """The cells, a few hundred in memory at a time; texts as bytes, as Arrow may hold invalid UTF-8."""
    is_text = not pa.types.is_struct(column.type)
    for chunk in column.chunks:
        for start in range(0, len(chunk), 256):
            part = chunk.slice(start, 256)
            yield from (part.cast(pa.large_binary()) if is_text else part).to_pylist()


def _at_depth(content: pa.ChunkedArray, depth: Depth) -> pa.ChunkedArray:
    """Pictures, which have been checked, as the job wants them seen; they are in memory then."""
    seen = (seen_picture(image_bytes(cell), "image", depth, Diagnostics()) for cell in _values(content))
    cells = [{"bytes": data, "path": None} for data in seen]
    return pa.chunked_array([pa.array(cells, content.type)])


def _check_text(
    cell: bytes | None, rows: Rows, where: str, depth: Depth | None, diagnostics: Diagnostics
) -> tuple[bytes, tuple[int, ...]]:
    text = checked_text(cell, where)
    return hashlib.sha256(text.encode()).digest(), (len(text),)


def _check_image(
    cell: Mapping[str, Any], rows: Rows, where: str, depth: Depth | None, diagnostics: Diagnostics
) -> tuple[bytes, tuple[int, ...]]:
    data, name = _safe_bytes(cell, rows, where)
    decoded = decode(data, name, depth=depth)
    remark(decoded, name, diagnostics)
    if decoded.more_frames:
        diagnostics.warning("of several frames or pages only the first is used", name)
    width, height = decoded.image.size
    return hashlib.sha256(data).digest(), (width * height, width, height)


def _safe_bytes(cell: Mapping[str, Any], rows: Rows, where: str) -> tuple[bytes, str]:
    """An image's bytes and name; a file is opened only if it is a regular one inside the shard."""
    if cell["bytes"] is not None:
        return image_bytes(cell), where
    if not cell["path"]:
        raise DataError(f"{where}: no image, expected its bytes or its path")
    path = checked_file(Path(cell["path"]), rows.folder)
    return image_bytes(cell), where if rows.is_canonical else f"{where}: {shown(path)}"


# Remarks


def _remark_all(examples: Mapping[str, list[_Example]], diagnostics: Diagnostics) -> None:
    for split, rows in examples.items():
        _remark_few(split, rows, diagnostics)
        if repeats := _repeats(rows):
            diagnostics.warning(f"{split}: {repeats} examples repeat the content of another one")
        if torn := _contradictions(rows):
            diagnostics.warning(f"{split}: {torn} contents come with more than one label")
    _remark_leaks(examples.get("train", []), examples.get("test", []), diagnostics)


def _remark_few(split: str, examples: list[_Example], diagnostics: Diagnostics) -> None:
    classes = {example.label for example in examples}
    if len(examples) == 1:
        diagnostics.warning(f"{split}: only one example")
    elif len(classes) == 1:
        diagnostics.warning(f"{split}: all examples are of one class, {classes.pop()!r}")


def _remark_leaks(train: list[_Example], test: list[_Example], diagnostics: Diagnostics) -> None:
    seen = {example.digest for example in train}
    if leaked := sum(example.digest in seen for example in test):
        diagnostics.warning(
            f"test: {leaked} examples have the content of a training example, so scores will flatter"
        )
    unknown = {example.label for example in test} - {example.label for example in train}
    if train and unknown:
        diagnostics.warning(f"test: classes {sorted(unknown)} are not in train")


def _repeats(examples: list[_Example]) -> int:
    return len(examples) - len({example.digest for example in examples})


def _contradictions(examples: Iterable[_Example]) -> int:
    pairs = {(example.digest, example.label) for example in examples}
    return sum(count > 1 for count in Counter(digest for digest, _ in pairs).values())


def _findings(examples: Mapping[str, list[_Example]], kind: _Kind, diagnostics: Diagnostics) -> Findings:
    for spellings in alike([[one.label for one in rows] for rows in examples.values()]):
        diagnostics.warning(f"classes {spellings} differ by case or space only")
    _remark_all(examples, diagnostics)
    sizes = sorted(example.size for rows in examples.values() for example in rows)
    return Findings(
        train=_classes(examples.get("train", [])),
        test=_classes(examples.get("test", [])),
        sizes=_spread(sizes, kind) if sizes else "",
        bad=len(diagnostics.problems),
        problems=tuple(diagnostics.problems[:LISTED_PROBLEMS]),
        duplicates=sum(map(_repeats, examples.values())),
        notes=diagnostics.notes,
        counts=() if diagnostics.problems else diagnostics.counts_of(len(sizes)),
    )


def _classes(examples: Iterable[_Example]) -> dict[str, int]:
    return dict(sorted(Counter(example.label for example in examples).items()))


def _spread(sizes: list[tuple[int, ...]], kind: _Kind) -> str:
    smallest, median, largest = (kind.sizes(sizes[place]) for place in (0, len(sizes) // 2, -1))
    return f"{smallest} to {largest}, half of them up to {median}"


_TEXTS = _Kind(
    role="text",
    read_classes=text_classes,
    column=text_column,
    check=_check_text,
    sizes=lambda size: f"{size[0]} characters",
)
_IMAGES = _Kind(
    role="image",
    read_classes=image_classes,
    column=image_column,
    check=_check_image,
    sizes=lambda size: f"{size[1]} x {size[2]} pixels",
)
_KINDS = {"text-classification": _TEXTS, "image-classification": _IMAGES}
