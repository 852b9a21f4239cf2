"""A real site's shards: one folder or file for each client that lives there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atoll.data.classification import Table
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts
from atoll.errors import ConfigError, DataError
from atoll.job.job import Job
from atoll.tasks import task_named


@dataclass(frozen=True)
class LoadedData:
    """The rows of a path, and in `reading` the files, times and columns with which they were read."""

    reading: str
    dataset: Dataset
    fingerprint: str
    counts: tuple[Counts, ...]


@dataclass
class FolderShards:
    """The shards of a real site: paths by client name, read and checked again when their files change."""

    paths: dict[str, Path]
    _read: dict[str, LoadedData] = field(default_factory=dict)

    @classmethod
    def of(cls, site: str, paths: Sequence[Path]) -> FolderShards:
        """The shards at these paths: a single one gets the site's name, several the names of their folders.

        Raises:
            ConfigError: two clients would have the same name.
        """
        if len(paths) == 1:
            return cls({site: paths[0]})
        named = {path.name: path for path in paths}
        if len(named) < len(paths):
            raise ConfigError(
                f"--data: {len(paths)} folders with {len(named)} names, expected a name for each"
            )
        return cls(named)

    def names(self, job: Job) -> list[str]:
        return sorted(self.paths)

    def dataset(self, job: Job, client: str) -> Dataset:
        return self._current(job, client).dataset

    def fingerprint(self, job: Job, client: str) -> str:
        return self._current(job, client).fingerprint

    def counts(self, job: Job, client: str) -> tuple[Counts, ...]:
        return self._current(job, client).counts

    def _current(self, job: Job, client: str) -> LoadedData:
        if client not in self.paths:
            raise DataError(f"client {client} does not live at this site")
        data = job.data
        names = [data.text, data.image, data.label, data.columns, data.time_format, data.bits, data.window]
        reading = json.dumps([job.task.model_dump(), names, _stamp(self.paths[client])])
        known = self._read.get(client)
        if known is None or known.reading != reading:
            task = task_named(job.task.name)
            table = task.read(self.paths[client], data, job.task.options)
            rows = table.train
            fingerprint = hashlib.sha256(b"".join(sorted(task.keys(rows)))).hexdigest()
            self._read[client] = known = LoadedData(reading, rows, fingerprint, _counts(table))
        return known


def _counts(table: Table) -> tuple[Counts, ...]:
    """The counts of a table; its test part counts as left out, since a site uses its own validation split."""
    whole = Counts(
        "examples", len(table.train) + len(table.test or ()), len(table.train) + len(table.test or ())
    )
    counts = table.counts or (whole,)
    if not table.test:
        return counts
    unused = {"that are held out and not measured on at a site": len(table.test)}
    return (*counts, Counts("test examples", len(table.test), 0, unused))


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """(name, size, modification time) of each file, to detect changes.

    Every request asks for it several times, and a folder may hold thousands of files: each is looked at once.
    """
    if path.is_file():
        status = path.stat()
        return [(str(path), status.st_size, status.st_mtime_ns)]
    files = ((file.path, file.stat()) for file in _files_in(path))
    return sorted((name, status.st_size, status.st_mtime_ns) for name, status in files)


def _files_in(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """The files below a folder, without those behind links to folders.

    There are none in a folder that is missing or closed to the site; whoever reads the data says so.
    """
    try:
        with os.scandir(folder) as entries:
            inside = list(entries)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_in(entry.path)
        elif Path(entry).is_file() if entry.is_symlink() else entry.is_file():
            yield entry  # a link that leads round in a circle is no file to a path, and an error to an entry
