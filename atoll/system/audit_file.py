"""A log of what came, what was decided and what left: append-only, chained by hashes, of a site or a server.

Each line says when it was written and what was decided; `atoll.system.chained_log` has the chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atoll.errors import DataError
from atoll.system.chained_log import ChainedLog

FILE = "audit.jsonl"
FORMAT = 1


@dataclass
class AuditFile:
    """The log in one kit; several processes may write to it."""

    log: ChainedLog

    @classmethod
    def open(cls, state: Path) -> AuditFile:
        """The log in a kit's state folder, read and checked; a new one if there is none.

        Raises:
            DataError: it was changed.
        """
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = cls(ChainedLog(state / FILE, _check_line))
        with opened.log.alone():
            if not opened.log.lines:
                opened.log.append({"format": FORMAT})
        return opened

    def write(self, fields: Mapping[str, Any], *, durable: bool = True) -> None:
        """Add a line that has a `decision`; one that isn't `durable` is on the disk with the next that is."""
        with self.log.alone():
            at = datetime.now(UTC).isoformat(timespec="seconds")
            self.log.append({"at": at, **fields}, durable=durable)


@dataclass(frozen=True)
class Verified:
    """A log that is whole: how many lines it has beside the first, and when they were written.

    Lines cut off at its end don't show in the file: who notes the hash of the last line can tell.
    """

    path: Path
    lines: int
    first: str
    last: str
    sha256: str


def verify(path: Path) -> Verified:
    """Read a log, named by its file or by its kit's state folder, from its first line to its last.

    Raises:
        DataError: there is none, or a line was changed, removed or put in between; it names the line.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; a site that has joined once has one, and a server that has had a job"
        )
    times: list[str] = []

    def read(fields: Mapping[str, Any], number: int) -> None:
        _check_line(fields, number)
        times.extend([str(fields["at"])] if number else [])

    log = ChainedLog(path, read)
    with log.alone():
        pass
    return Verified(path, len(times), times[0] if times else "", times[-1] if times else "", log.last)


def _check_line(fields: Mapping[str, Any], number: int) -> None:
    if number == 0 and fields.get("format") != FORMAT:
        raise ValueError(f"format {fields.get('format')!r}, this version of Atoll reads {FORMAT}")
    if number:
        fields["at"], fields["decision"]
