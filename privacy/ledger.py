"""What a unit's data has been charged, on disk: append-only, synced, every line chained to the one before.

An entry is written and synced before its release leaves, so a crash in between can only charge too
much. The chain (SHA-256 of the line before) makes a line that was changed, removed or put in
between show when the file is read; that lines are missing at the end, only who has seen them can
tell. One ledger is one data set's: it is bound to a fingerprint, and outlives runs and jobs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from privacy.accounting import Release
from protocol.errors import DataError

FORMAT = 1
START = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One charge: for which release of which round of which job."""

    job: str
    round: int
    unit: str
    release: Release
    count: int = 1


@dataclass
class Ledger:
    """An open ledger; `spent` counts every kind of release that was ever charged."""

    path: Path
    spent: Counter[Release]
    entries: list[Entry]
    _last: str = START

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> Ledger:
        """The ledger at `path`, read and checked; a new one if there is none.

        A last line that a crash left unfinished is taken off: its release never left.

        Raises:
            DataError: the chain is broken, or the ledger belongs to other data.
        """
        ledger = cls(path, Counter(), [])
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            ledger._append({"format": FORMAT, "data": fingerprint})
            return ledger
        whole = _whole_lines(path)
        for number, line in enumerate(whole, start=1):
            ledger._read(line, number, fingerprint)
        if not whole:
            ledger._append({"format": FORMAT, "data": fingerprint})
        return ledger

    def charge(self, entry: Entry) -> None:
        """Write an entry down and wait until it is on the disk; only then may the release leave."""
        self._append(
            {
                "job": entry.job,
                "round": entry.round,
                "unit": entry.unit,
                "noise_multiplier": entry.release.noise_multiplier,
                "sampling_rate": entry.release.sampling_rate,
                "count": entry.count,
            }
        )
        self._count(entry)

    def _count(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.spent[entry.release] += entry.count

    def _append(self, fields: dict[str, object]) -> None:
        line = json.dumps({"before": self._last, **fields}, sort_keys=True) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._last = hashlib.sha256(line.encode()).hexdigest()

    def _read(self, line: bytes, number: int, fingerprint: str) -> None:
        where = f"{self.path} line {number}"
        try:
            fields = json.loads(line)
            before = fields["before"]
            entry = None if number == 1 else _entry(fields)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not an entry of a ledger ({error}); it was changed") from None
        if before != self._last:
            raise DataError(f"{where}: does not follow the line before it; the ledger was changed")
        if entry is None and fields.get("format") != FORMAT:
            raise DataError(f"{where}: format {fields.get('format')!r}, this version of Atoll reads {FORMAT}")
        if entry is None and fields.get("data") != fingerprint:
            raise DataError(f"{self.path}: belongs to other data than what is here; expected its own ledger")
        self._last = hashlib.sha256(line).hexdigest()
        if entry is not None:
            self._count(entry)


def _whole_lines(path: Path) -> list[bytes]:
    """All lines that end; what stands behind the last end is cut off the file."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return content[:end].splitlines(keepends=True)


def _entry(fields: dict[str, object]) -> Entry:
    release = Release(float(str(fields["noise_multiplier"])), float(str(fields["sampling_rate"])))
    count = int(str(fields["count"]))
    if count < 1:
        raise ValueError(f"count {count}")
    return Entry(str(fields["job"]), int(str(fields["round"])), str(fields["unit"]), release, count)
