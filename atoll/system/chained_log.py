"""A file of JSON lines that is only ever appended to, each line chained to the one before by its hash.

A line is on the disk before `append` returns. The chain (SHA-256 of the line before) makes a line that was
changed, removed or put in between show when the file is read; that lines are missing at the end, only who has
seen them can tell. Several processes may write to one file at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from atoll.errors import DataError
from atoll.system.durable_files import append_synced, cut_synced, sync_folder

START = "0" * 64

LOOK_SECONDS = 0.002
"""How often to look whether another process has let go of the file."""


@dataclass
class ChainedLog:
    """The open file; `read` is called with the fields of each line found in it, and how many came before.

    What `read` raises as ValueError, KeyError or TypeError means that the line is none of a `what`. Lines
    that aren't `durable` are not waited for.
    """

    path: Path
    read: Callable[[Mapping[str, Any], int], None]
    what: str = "log"
    durable: bool = True
    lines: int = 0
    last: str = START
    """The hash of the last line."""
    _end: int = 0
    _lock: FileLock = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._lock = FileLock(f"{self.path}.lock", poll_interval=LOOK_SECONDS)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the time of the block everything in the file is read, and nobody else writes to it.

        Blocks may lie within each other. A last line that a crash left unfinished is taken off.

        Raises:
            DataError: the file was changed.
        """
        with self._lock:
            if self._lock.lock_counter == 1:
                self._catch_up()
            yield

    def append(self, fields: Mapping[str, object], *, durable: bool = True) -> None:
        """Write one line and wait until it is on the disk; only within `alone`.

        One that isn't `durable` is waited for with the next that is.
        """
        line = (json.dumps({"before": self.last, **fields}, sort_keys=True) + "\n").encode()
        if not self._end and self.durable:
            self._make()
        append_synced(self.path, line, durable=self.durable and durable)
        self._step(line)

    def _make(self) -> None:
        """Have the file's name on the disk before its first line: a line that was read back is not lost."""
        append_synced(self.path, b"")
        sync_folder(self.path.parent)

    def _catch_up(self) -> None:
        """Read what was appended since; what stands behind the last whole line is cut off."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._end)
            rest = file.read()
        whole = rest[: rest.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            self._take(line)
        if len(whole) < len(rest):
            cut_synced(self.path, self._end)

    def _take(self, line: bytes) -> None:
        where = f"{self.path} line {self.lines + 1}"
        try:
            fields = json.loads(line)
            before = fields["before"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not an entry of a {self.what} ({error}); it was changed") from None
        if before != self.last:
            raise DataError(f"{where}: does not follow the line before it; the {self.what} was changed")
        try:
            self.read(fields, self.lines)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not an entry of a {self.what} ({error}); it was changed") from None
        self._step(line)

    def _step(self, line: bytes) -> None:
        self.last = hashlib.sha256(line).hexdigest()
        self.lines += 1
        self._end += len(line)
