"""Data sets that extensions bring: what their function returns is read as the job's task reads files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from atoll.datasets.registry import ALL_SOURCES
from atoll.errors import ConfigError, DataError
from atoll.job.extension_options import checked_options
from atoll.job.job import Job
from atoll.plugins import Extension, failure_of, in_one_line
from atoll.system.cache import cache_root, cached_folder

Read = TypeVar("Read")
PARTS = ("train", "test")


def brought_source(job: Job, read: Callable[[Path], Read]) -> Read:
    """What `read` makes of the path at which the data of the job's source lies, an extension's.

    Its function is called anew each time. Tables are kept in the cache under a hash of what they hold, so
    that what is read is what was returned.

    Raises:
        ConfigError: its options don't fit, or it raises an error, or returns no data.
        DataError: what it returns isn't data of the task.
    """
    extension = ALL_SOURCES[job.data.source]
    assert isinstance(extension, Extension)
    extension = extension.loaded()
    options = checked_options(extension, job.data.options, "data.options")
    returned = _returned(extension, job.backbone.offline, options)
    if isinstance(returned, str | Path):
        path = Path(returned)
        if not path.exists():
            raise ConfigError(
                f"{_called(extension)} returned {path}, where nothing is; expected a folder or file"
            )
        return read(path)
    folder = _cached_folder(extension, _tables(extension, returned))
    try:
        return read(folder)
    except DataError as error:
        raise DataError(str(error).replace(str(folder), _called(extension))) from None


def _returned(extension: Extension, offline: bool, options: tuple[object, ...]) -> Any:
    results: list[Any] = []
    failure = failure_of(lambda: results.append(extension.thing(offline, *options)))  # type: ignore[misc]
    if isinstance(failure, DataError):
        raise DataError(f"{_called(extension)}: {failure}") from None
    if failure is not None:
        raise ConfigError(f"{_called(extension)} raised {in_one_line(failure)}") from failure
    return results[0]


def _tables(extension: Extension, returned: Any) -> dict[str, pa.Table]:
    """The parts as tables, each of at least one row.

    Raises:
        ConfigError: it is something else.
    """
    expected = 'expected a path, or {"train": table} and maybe "test"'
    if not isinstance(returned, Mapping) or "train" not in returned:
        form = f"keys {list(returned)}" if isinstance(returned, Mapping) else type(returned).__name__
        raise ConfigError(f"{_called(extension)} returned {form}, {expected}")
    if extra := [part for part in returned if part not in PARTS]:
        raise ConfigError(f"{_called(extension)} returned a part {extra[0]!r}, {expected}")
    tables = {part: _table(extension, part, rows) for part, rows in returned.items()}
    for part, table in tables.items():
        if not len(table):
            raise ConfigError(f"{_called(extension)}: {part} has no rows, expected at least one")
    return tables


def _table(extension: Extension, part: str, rows: Any) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    if not isinstance(rows, Mapping):
        raise ConfigError(
            f"{_called(extension)}: {part} is {type(rows).__name__}, expected a pyarrow.Table or a"
            " dictionary of columns"
        )
    try:
        return pa.table({str(name): column for name, column in rows.items()})
    except (pa.ArrowException, TypeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"{_called(extension)}: {part} is no table: {first}") from None


def _cached_folder(extension: Extension, tables: Mapping[str, pa.Table]) -> Path:
    """The folder in the cache in which these tables are Parquet files."""
    digest = hashlib.sha256()
    for part, table in sorted(tables.items()):
        digest.update(f"{part} {table.schema.to_string()}".encode())
        sink = _Hashed(digest)
        with pa.ipc.new_stream(pa.PythonFile(sink, "w"), table.schema) as stream:
            stream.write_table(table.combine_chunks())

    def write(staging: Path) -> None:
        for part, table in tables.items():
            pq.write_table(table, staging / f"{part}.parquet", compression="zstd")

    return cached_folder(cache_root() / "sources" / f"brought-{digest.hexdigest()[:32]}", write)


class _Hashed:
    """A file of which nothing but its hash is kept."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


def _called(extension: Extension) -> str:
    return f"data.source {extension.name} ({extension.origin})"
