"""Rows of several named parts, read, checked, hashed and written by one rule for every task.

A task says which parts (roles) an example has: a question and an answer, an image and its boxes. A shard
is a CSV, TSV, JSON Lines or Parquet file, a saved dataset, or a folder that holds one such file or train
and test; parts that are files (images, sounds) are paths beside it, or bytes in it. A task with another
layout (a folder per class, COCO's) says how it is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from atoll.data.classification import LISTED_PROBLEMS, Findings, Table
from atoll.data.columns import file_column, other_columns, role_column, values_of
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts, Diagnostics, shown
from atoll.data.folders import checked_file
from atoll.data.images import Depth, seen_picture
from atoll.data.layouts import collecting_errors, open_shard, used_splits
from atoll.data.tables import SUFFIXES, Rows
from atoll.data.writers import write_records
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection

MAX_FILE_BYTES = 200_000_000


Picture = Callable[[bytes, str, "Depth | None", Diagnostics], bytes]
"""Makes of a file's bytes those of a picture as the job wants it seen, given the place's name."""


@dataclass(frozen=True)
class SchemaField:
    """One part of an example.

    `read` makes a cell's canonical value of what stands there and the place's name, or raises DataError.
    For a part that is a `file` it is given the file's bytes, and what it returns is not kept.
    A role that isn't `required` may be missing as a column. A `picture` reads a file too, and returns the
    bytes to be kept where the job says how deep grey pictures are seen.
    """

    name: str
    read: Callable[[Any, str], Any]
    kind: pa.DataType
    usual: tuple[str, ...] = ()
    required: bool = True
    file: bool = False
    picture: Picture | None = None


FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""A part that is a file: its bytes, or where they lie."""


def picture_field(read: Callable[[Any, str], Any]) -> SchemaField:
    """The role `image`: a photo, whatever its column is called."""
    usual = ("img", "file", "file_name", "path", "picture", "photo")
    return SchemaField("image", read, FILE, usual, file=True, picture=seen_picture)


Opener = Callable[[Path, Diagnostics], dict[str, Rows] | None]
"""Another layout than a file of rows: the splits at a path, or None where it isn't that layout."""


def _nothing_else(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    return None


def _any_will_do(parts: Mapping[str, Any], where: str) -> None:
    return None


def _nothing_odd(dataset: Dataset) -> str | None:
    return None


@dataclass(frozen=True)
class Schema:
    """How a task's data is read: its roles, by what examples are counted, and other layouts."""

    roles: tuple[SchemaField, ...]
    count_by: str | None = None
    open_layout: Opener = _nothing_else
    layout: str = f"one file of {', '.join(SUFFIXES)}"
    check_row: Callable[[Mapping[str, Any], str], None] = _any_will_do
    """Raises DataError where an example's parts, each sound, don't fit one another."""
    odd: Callable[[Dataset], str | None] = _nothing_odd
    """What is remarkable in the sound examples of a split together, if anything is."""

    def read(self, path: Path, data: DataSection) -> Table:
        """The checked examples at `path`.

        Raises:
            DataError: the first bad example, and how many there are.
        """
        diagnostics = Diagnostics()
        return self.table_of(path, self.gather(path, data, diagnostics), diagnostics)

    def inspect(self, path: Path, data: DataSection) -> Findings:
        """What is at `path`, good and bad; raises only if there is nothing to look at."""
        diagnostics = Diagnostics()
        return self.findings_of(path, self.gather(path, data, diagnostics), diagnostics)

    def table_of(self, path: Path, splits: Mapping[str, pa.Table], diagnostics: Diagnostics) -> Table:
        """Gathered splits, once it is clear that nothing in them is bad."""
        diagnostics.close()
        for split, table in splits.items():
            if not table.num_rows:
                raise DataError(f"{shown(path)}: no examples to {split} on, expected at least one")
        keys = self._remark(splits, diagnostics)
        counts = diagnostics.counts_of(sum(map(len, keys.values())))
        return _table(splits, diagnostics.notes, counts)

    def findings_of(self, path: Path, splits: Mapping[str, pa.Table], diagnostics: Diagnostics) -> Findings:
        """What `atoll check` tells of gathered splits."""
        if not diagnostics.problems and not any(table.num_rows for table in splits.values()):
            raise DataError(f"{shown(path)}: no examples to train on, expected at least one")
        keys = self._remark(splits, diagnostics)
        return Findings(
            train=self._counts(splits.get("train")),
            test=self._counts(splits.get("test")),
            sizes=_sizes(splits),
            bad=len(diagnostics.problems),
            problems=tuple(diagnostics.problems[:LISTED_PROBLEMS]),
            duplicates=sum(len(keys_of_split) - len(set(keys_of_split)) for keys_of_split in keys.values()),
            notes=diagnostics.notes,
            class_counts=self.count_by or "",
            counts=() if diagnostics.problems else diagnostics.counts_of(sum(map(len, keys.values()))),
        )

    def _remark(self, splits: Mapping[str, pa.Table], diagnostics: Diagnostics) -> dict[str, list[bytes]]:
        """Note what is remarkable; return the hashes of each split's examples."""
        keys = {split: self.keys(Dataset(table)) for split, table in splits.items()}
        _remark(keys, diagnostics)
        for split, table in splits.items():
            if table.num_rows and (odd_values := self.odd(Dataset(table))):
                diagnostics.warning(f"{split}: {odd_values}")
        return keys

    def adopted(self, splits: Mapping[str, pa.Table], counts: Sequence[Counts] = ()) -> Table:
        """Splits that are canonical already, such as a built-in source's."""
        return _table(splits, (), tuple(counts))

    def keys(self, dataset: Dataset) -> list[bytes]:
        """A 32-byte hash of each example's parts, files by their bytes, in the order of the roles."""
        digests = [hashlib.sha256() for _ in range(len(dataset))]
        for role in self.roles:
            if role.name not in dataset.column_names:
                continue
            for digest, cell in zip(digests, dataset.cells(role.name), strict=True):
                content = (
                    file_bytes(cell, role.name) if role.file else json.dumps(cell, sort_keys=True).encode()
                )
                # Lengths keep the parts apart.
                digest.update(f"{role.name} {len(content)} ".encode() + content)
        return [digest.digest() for digest in digests]

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        """`data.jsonl` with a line an example, its files beside it; named as the job names columns."""
        files = [role.name for role in self.roles if role.file and role.name in dataset.column_names]
        names = {role.name: chosen_name(data, role.name) or role.name for role in self.roles}
        write_records(dataset, folder, files, names)

    def check(self, data: DataSection) -> None:
        """Raises ConfigError where `data.columns` names a part that there isn't."""
        known = [role.name for role in self.roles]
        for role in data.columns:
            if role not in known:
                raise ConfigError(f"data.columns.{role}: expected one of {', '.join(known)}")

    def gather(self, path: Path, data: DataSection, diagnostics: Diagnostics) -> dict[str, pa.Table]:
        """The splits in canonical columns; what is wrong with rows that are left out is noted."""
        self.check(data)
        tables: dict[str, pa.Table] = {}
        with collecting_errors(path, diagnostics):
            layout_rows = self.open_layout(path, diagnostics)
            opened = (
                used_splits(layout_rows, path, diagnostics)
                if layout_rows
                else self._opened(path, diagnostics)
            )
            for split, rows in opened.items():
                diagnostics.rows_read += rows.table.num_rows
                tables[split] = self.canonical(rows, data, diagnostics)
        return tables

    def _opened(self, path: Path, diagnostics: Diagnostics) -> dict[str, Rows]:
        return open_shard(path, self._no_classes, diagnostics, expected=self.layout)

    def has(self, path: Path, *names: str) -> bool:
        """Whether rows with these columns lie at a path; what can't be opened has none."""
        rows = self.first_rows(path)
        return rows is not None and set(names) <= set(rows.table.column_names)

    def first_rows(self, path: Path) -> Rows | None:
        """The training rows at a path as they are found, unchecked; None where they can't be opened."""
        try:
            return open_shard(path, self._no_classes, Diagnostics())["train"]
        except DataError:
            return None

    def _no_classes(self, root: Path, base: Path, diagnostics: Diagnostics) -> Rows:
        raise DataError(f"{shown(root)}: a folder of folders, expected {self.layout}")

    def canonical(self, rows: Rows, data: DataSection, diagnostics: Diagnostics) -> pa.Table:
        """The rows whose every part could be read; what is wrong with the others is noted."""
        named = {role.name: self._column(rows, role, data) for role in self.roles}
        present = [role for role in self.roles if named[role.name] is not None]
        columns: dict[str, list[Any]] = {role.name: [] for role in present}
        read = partial(_read_cell, rows=rows, depth=Depth.of(data), diagnostics=diagnostics)
        raw = [_raw_cells(rows, role, str(named[role.name])) for role in present]
        places = []
        for place, cells in enumerate(zip(*raw, strict=True)):
            where = rows.where(place)
            try:
                values = [read(role, cell, where) for role, cell in zip(present, cells, strict=True)]
                self.check_row({r.name: v for r, v in zip(present, values, strict=True)}, where)
            except DataError as problem:
                message = str(problem)
                diagnostics.error(problem if message.startswith(where) else DataError(f"{where}: {message}"))
                continue
            places.append(place)
            for role, value in zip(present, values, strict=True):
                columns[role.name].append(value)
        used = [str(named[role.name]) for role in present]
        others = other_columns(rows, used, "", diagnostics)
        columns_out = {
            role.name: pa.chunked_array([pa.array(columns[role.name], role.kind)]) for role in present
        }
        rest = {
            name: c.take(pa.array(places, pa.int64()))
            for name, c in others.items()
            if name not in columns_out
        }
        return pa.table(columns_out | rest)

    def _column(self, rows: Rows, role: SchemaField, data: DataSection) -> str | None:
        if rows.is_canonical:
            return role.name if role.name in rows.table.column_names else None
        usual = (role.name, *role.usual)
        return role_column(rows, role.name, chosen_name(data, role.name), usual, required=role.required)

    def _counts(self, table: pa.Table | None) -> dict[str, int]:
        if table is None:
            return {}
        if self.count_by is None or self.count_by not in table.column_names:
            return {"examples": table.num_rows}
        return dict(sorted(Counter(map(str, table.column(self.count_by).to_pylist())).items()))


def chosen_name(data: DataSection, role: str) -> str | None:
    """The column that the job names for a role: `data.text`, `image`, `label`, or in `data.columns`."""
    chosen = getattr(data, role) if role in ("text", "image", "label") else None
    return chosen or data.columns.get(role)


def file_bytes(cell: Mapping[str, Any], what: str) -> bytes:
    """The bytes of a part that is a file, read from where they lie unless they are at hand."""
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    if not cell["path"]:
        raise DataError(f"no {what}, expected its bytes or its path")
    try:
        with Path(cell["path"]).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{shown(cell['path'])}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{shown(cell['path'])}: more than {MAX_FILE_BYTES} bytes, the most that is allowed")
    return data


def _raw_cells(rows: Rows, role: SchemaField, name: str) -> Iterator[Any]:
    return _cells(
        file_column(rows, name, f"{role.name}s or their paths") if role.file else values_of(rows, name)
    )


def _cells(column: pa.ChunkedArray) -> Iterator[Any]:
    """The cells as Python values, a few hundred in memory at a time."""
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        for start in range(0, len(chunk), 256):
            yield from chunk.slice(start, 256).to_pylist()


def _read_cell(
    role: SchemaField, cell: Any, where: str, *, rows: Rows, depth: Depth | None, diagnostics: Diagnostics
) -> Any:
    if not role.file:
        return role.read(cell, where)
    if cell["bytes"] is None and cell["path"]:
        path = checked_file(Path(cell["path"]), rows.folder)
        where = where if rows.is_canonical else f"{where}: {shown(path)}"
    data = file_bytes(cell, role.name)
    if role.picture is None:
        role.read(data, where)
        return cell
    seen = role.picture(data, where, depth, diagnostics)
    return cell if depth is None else {"bytes": seen, "path": None}


def _remark(keys: Mapping[str, Sequence[bytes]], diagnostics: Diagnostics) -> None:
    for split, keys_of_split in keys.items():
        if repeats := len(keys_of_split) - len(set(keys_of_split)):
            diagnostics.warning(f"{split}: {repeats} examples repeat the content of another one")
    seen = set(keys.get("train", ()))
    if leaked := sum(key in seen for key in keys.get("test", ())):
        diagnostics.warning(f"test: {leaked} examples are training examples too, so scores will flatter")


def _sizes(splits: Mapping[str, pa.Table]) -> str:
    train, test = (splits[name].num_rows if name in splits else 0 for name in ("train", "test"))
    return f"{train} examples to train on, {test} to test on" if test else f"{train} examples"


def _table(splits: Mapping[str, pa.Table], notes: tuple[str, ...], counts: tuple[Counts, ...]) -> Table:
    test = splits.get("test")
    return Table(Dataset(splits["train"]), None if test is None else Dataset(test), notes, counts)


def whole(splits: Mapping[str, pa.Table]) -> pa.Table:
    """All splits of a source in one, for tasks that hold their test part out by another rule."""
    return pa.concat_tables(list(splits.values()))
