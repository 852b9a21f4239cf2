"""Tar files as WebDataset writes them: the files of one example lie together and share a name, its key.

| a file of the example `KEY` | becomes |
|---|---|
| `KEY.jpg`, `.png`, … | `image` |
| `KEY.wav`, `.flac`, … | `audio` |
| `KEY.txt` | `text` |
| `KEY.cls` | `label`, a whole number |
| `KEY.json` | a column for each key of its object |
| `KEY.NAME.png`, `KEY.NAME.txt`, … | `NAME` |
| `KEY.id`, anything else | a column called by the ending, which tasks don't know |

A key is a file's path up to the first dot of its name, an ending what follows that dot in lower case. Nothing
is unpacked to the disk, no link is followed, and no ending makes Python objects of bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa

from atoll.data.audio import AUDIO_SUFFIXES
from atoll.data.diagnostics import Diagnostics, opened, shown
from atoll.data.images import IMAGE_SUFFIXES, MAX_IMAGE_BYTES
from atoll.data.tables import MAX_LINE_BYTES, Rows, json_row, mapped, typed_column
from atoll.data.texts import decoded
from atoll.errors import DataError

_FILE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXTS = {"txt": "text", "text": "text", "cls": "label", "json": None}
"""Endings of files that are read as text, and the columns they become; a JSON object has its own."""
_BATCH = 64
"""Examples whose files are in memory at a time."""


@dataclass
class _Sample:
    """One example: what its texts say, and where its other files lie in the tar file."""

    key: str
    values: dict[str, object] = field(default_factory=dict)
    files: dict[str, tarfile.TarInfo] = field(default_factory=dict)

    def check_new(self, column: str, where: str) -> None:
        if column in self.values or column in self.files:
            raise DataError(f"{where}: a second value for {column!r}, expected one an example")


def read_webdataset(path: Path, diagnostics: Diagnostics) -> Rows:
    """The rows of one tar file, an example each, in its order; files' bytes are mapped, not held.

    Raises:
        DataError: it is damaged, holds something else than files, or an example in two places.
    """
    samples: list[_Sample] = []

    def where(row: int) -> str:
        return f"{shown(path)} {shown(samples[row].key)}"

    with opened(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                samples += _samples(tar, path, diagnostics)
                _check_end(file, tar, path)
                table = _table(tar, samples, path, where)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{shown(path)}: damaged ({error}), expected a tar file") from None
    return Rows(shown(path), table, where, path.parent)


def _samples(tar: tarfile.TarFile, path: Path, diagnostics: Diagnostics) -> list[_Sample]:
    samples: dict[str, _Sample] = {}
    last, left_out = "", 0
    for member in tar:
        if member.isdir():
            continue
        where = f"{shown(path)} {shown(member.name)}"
        if not member.isreg():
            raise DataError(f"{where}: a link or a device, expected files")
        key, ending = _key_and_ending(member.name)
        if not key or not ending:
            left_out += 1
            continue
        if key != last and key in samples:
            raise DataError(f"{where}: the key {shown(key)} again, expected an example's files side by side")
        last = key
        _add(samples.setdefault(key, _Sample(key)), tar, member, ending, where)
    if left_out:
        diagnostics.warning(f"{left_out} files without an ending are not read", shown(path))
    return list(samples.values())


def _check_end(file: BinaryIO, tar: tarfile.TarFile, path: Path) -> None:
    """Raises DataError unless zeros follow the last file: tarfile stops, silently, at damage too."""
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{shown(path)}: no end mark at byte {tar.offset}, expected a whole tar file")


def _key_and_ending(name: str) -> tuple[str, str]:
    """(path up to the first dot of the file's name, what follows in lower case); empty for hidden files.

    >>> _key_and_ending("a.b/0001.Seg.PNG")
    ('a.b/0001', 'seg.png')
    """
    place = PurePosixPath(name)
    start, _, ending = place.name.partition(".")
    return (str(place.parent / start), ending.lower()) if start else ("", "")


def _add(sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, where: str) -> None:
    """Note one file of an example; what is text is read at once."""
    name, _, kind = ending.rpartition(".")
    most = MAX_LINE_BYTES if kind in _TEXTS else MAX_IMAGE_BYTES
    if member.size > most:
        raise DataError(f"{where}: {member.size} bytes, at most {most} allowed")
    if kind not in _TEXTS:
        column = name or _usual_name(kind)
        sample.check_new(column, where)
        sample.files[column] = member
        return
    text = decoded(_bytes_of(tar, member, where), where, 0)
    values = (
        json_row(text, where) if kind == "json" else {name or str(_TEXTS[kind]): _value(text, kind, where)}
    )
    for column, value in values.items():
        sample.check_new(column, where)
        sample.values[column] = value


def _usual_name(kind: str) -> str:
    if f".{kind}" in IMAGE_SUFFIXES:
        return "image"
    return "audio" if f".{kind}" in AUDIO_SUFFIXES else kind


def _value(text: str, kind: str, where: str) -> object:
    if kind != "cls":
        return text
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{where}: {shown(repr(text[:40]))}, expected a whole number") from None


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes:
    stream = tar.extractfile(member)
    data = b"" if stream is None else stream.read()
    if len(data) != member.size:
        raise DataError(f"{where}: ends after {len(data)} bytes, expected {member.size}")
    return data


def _table(
    tar: tarfile.TarFile, samples: Sequence[_Sample], path: Path, where: Callable[[int], str]
) -> pa.Table:
    of_files = list(dict.fromkeys(column for sample in samples for column in sample.files))
    of_values = list(dict.fromkeys(column for sample in samples for column in sample.values))
    if both := set(of_files) & set(of_values):
        raise DataError(f"{shown(path)}: {sorted(both)[0]!r} is a file here and a value there, expected one")
    rows = [sample.values for sample in samples]
    columns = {name: typed_column(name, rows, where) for name in of_values}
    if not of_files:
        return pa.table(columns)
    schema = pa.schema([(name, _FILE) for name in of_files])
    files = mapped(schema, _batches(tar, samples, schema, where))
    return pa.table({**{name: files.column(name) for name in of_files}, **columns})


def _batches(
    tar: tarfile.TarFile, samples: Sequence[_Sample], schema: pa.Schema, where: Callable[[int], str]
) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(samples), _BATCH):
        rows = [
            {name: _file(tar, sample.files.get(name), where(row)) for name in schema.names}
            for row, sample in enumerate(samples[start : start + _BATCH], start)
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=schema)


def _file(tar: tarfile.TarFile, member: tarfile.TarInfo | None, where: str) -> dict[str, object] | None:
    return None if member is None else {"bytes": _bytes_of(tar, member, where), "path": member.name}
