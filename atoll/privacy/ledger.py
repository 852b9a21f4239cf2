"""What a unit's data has been charged, on disk: append-only, synced, every line chained to the one before.

An entry is written and synced before its release leaves, so a crash in between can only charge too much; a
line that was changed shows (`atoll.system.chained_log`). One ledger is bound to one owner of data, and
outlives runs and jobs, of which several may write to it at the same time: what is read, decided and written
within `alone` nobody comes between. Data that changes is charged on: what it held before may still be in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.errors import DataError
from atoll.privacy.accounting import Release
from atoll.system.chained_log import ChainedLog

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One charge: for which release of which round of which job, on data of which fingerprint."""

    job: str
    round: int
    unit: str
    release: Release
    count: int = 1
    data: str = ""


@dataclass
class Ledger:
    """An open ledger; `spent` counts every kind of release that was ever charged."""

    path: Path
    fingerprint: str
    durable: bool = True
    spent: Counter[Release] = field(default_factory=Counter)
    entries: list[Entry] = field(default_factory=list)
    _of_job: dict[str, Counter[Release]] = field(default_factory=dict)
    _rounds: dict[str, Counter[int]] = field(default_factory=dict)
    _log: ChainedLog = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._log = ChainedLog(self.path, self._read, "ledger", self.durable)

    @classmethod
    def open(cls, path: Path, fingerprint: str, *, durable: bool = True) -> Ledger:
        """The ledger at `path`, read and checked; a new one if there is none.

        A last line that a crash left unfinished is taken off: its release never left. What is not
        `durable` is not waited for: it is for noise that a seed repeats, and that protects nobody.

        Raises:
            DataError: the chain is broken, or the ledger belongs to other data.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger = cls(path, fingerprint, durable)
        with ledger.alone():
            if not ledger._log.lines:
                ledger._log.append({"format": FORMAT, "data": fingerprint})
        return ledger

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the time of the block the ledger is up to date, and nobody else's.

        What another process charged before is in `spent` then, and what it wants to charge has to wait: a
        decision by `spent` holds until the block ends. Blocks may lie within each other.

        Raises:
            DataError: the ledger was changed.
        """
        with self._log.alone():
            yield

    def charge(self, entry: Entry) -> None:
        """Write an entry down and wait until it is on the disk; only then may the release leave."""
        fields = {
            "job": entry.job,
            "round": entry.round,
            "unit": entry.unit,
            "noise_multiplier": entry.release.noise_multiplier,
            "sampling_rate": entry.release.sampling_rate,
            "count": entry.count,
            "data": entry.data,
        }
        with self.alone():
            self._log.append(fields)
            self._count(entry)

    def spent_on(self, job: str) -> Counter[Release]:
        """What one job was charged, of all the jobs on this data."""
        return self._of_job.get(job, Counter())

    def has(self, job: str, round: int) -> bool:
        """Whether that round of the job was charged."""
        return round in self._rounds.get(job, ())

    def rounds_of(self, job: str) -> Counter[int]:
        """How many times each round of the job was charged."""
        return self._rounds.get(job, Counter())

    def data_of(self, job: str) -> set[str]:
        """Fingerprints of the data that the job was charged for."""
        return {entry.data for entry in self.entries if entry.job == job}

    def _read(self, fields: Mapping[str, Any], number: int) -> None:
        if number:
            self._count(_entry(fields))
        elif fields.get("format") != FORMAT:
            raise DataError(
                f"{self.path} line 1: format {fields.get('format')!r}, this version of Atoll reads {FORMAT}"
            )
        elif fields.get("data") != self.fingerprint:
            raise DataError(f"{self.path}: belongs to other data than what is here; expected its own ledger")

    def _count(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.spent[entry.release] += entry.count
        self._of_job.setdefault(entry.job, Counter())[entry.release] += entry.count
        self._rounds.setdefault(entry.job, Counter())[entry.round] += 1


def _entry(fields: Mapping[str, Any]) -> Entry:
    release = Release(float(str(fields["noise_multiplier"])), float(str(fields["sampling_rate"])))
    count = int(str(fields["count"]))
    if count < 1:
        raise ValueError(f"count {count}")
    job, unit, data = str(fields["job"]), str(fields["unit"]), str(fields["data"])
    return Entry(job, int(str(fields["round"])), unit, release, count, data)
