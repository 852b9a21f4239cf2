"""A real site's shards: one folder or file for each client that lives there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from atoll.data.dataset import Dataset
from atoll.errors import ConfigError, DataError
from atoll.job.job import Job
from atoll.tasks import task_named


@dataclass(frozen=True)
class LoadedData:
    """A path's rows, as they were when `reading` (files, their times, the job's columns) was this."""

    reading: str
    dataset: Dataset
    fingerprint: str


@dataclass
class FolderShards:
    """Paths by client name; read, checked and remembered for as long as the files stay the same."""

    paths: dict[str, Path]
    _read: dict[str, LoadedData] = field(default_factory=dict)

    @classmethod
    def of(cls, site: str, paths: Sequence[Path]) -> FolderShards:
        """One path is the site's own shard; several are clients named as their folders.

        Raises:
            ConfigError: two of them have one name.
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

    def _current(self, job: Job, client: str) -> LoadedData:
        if client not in self.paths:
            raise DataError(f"client {client} does not live at this site")
        data = job.data
        names = [data.text, data.image, data.label, data.columns]
        reading = json.dumps([job.task.model_dump(), names, _stamp(self.paths[client])])
        known = self._read.get(client)
        if known is None or known.reading != reading:
            task = task_named(job.task.name)
            rows = task.read(self.paths[client], data, job.task.options).train
            fingerprint = hashlib.sha256(b"".join(sorted(task.keys(rows)))).hexdigest()
            self._read[client] = known = LoadedData(reading, rows, fingerprint)
        return known


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files, to notice when they change."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
