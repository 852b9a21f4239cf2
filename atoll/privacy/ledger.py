"""The ledger of privacy charges to one owner's data: an append-only file whose lines are chained by hashes.

An entry is written and synced before its release leaves, so a crash in between can only charge too much; a
changed line is detected (`atoll.system.chained_log`). A ledger belongs to one owner of data and lasts beyond
runs and jobs. Several processes may use it at the same time: within `alone` no other can write. Charges
remain when the data changes, since earlier content may still be in it.
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
    """One charge: `count` times `release`, for a round of a run (`job`), on data with this fingerprint."""

    job: str
    round: int
    unit: str
    release: Release
    count: int = 1
    data: str = ""


@dataclass
class Ledger:
    """An open ledger; `spent` counts all releases that were ever charged, by kind."""

    path: Path
    fingerprint: str
    durable: bool
    spent: Counter[Release] = field(default_factory=Counter)
    entries: list[Entry] = field(default_factory=list)
    _of_job: dict[str, Counter[Release]] = field(default_factory=dict)
    _rounds: dict[str, Counter[int]] = field(default_factory=dict)
    _log: ChainedLog = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._log = ChainedLog(self.path, self._read, "ledger", self.durable)

    @classmethod
    def open(cls, path: Path, fingerprint: str, *, durable: bool = True) -> Ledger:
        """The ledger at `path`, read and verified; a new one if the file does not exist.

        An unfinished last line after a crash is removed, since its release never left. Without `durable`,
        charges are not synced: that is for seeded noise in simulations, which protects nobody.

        Raises:
            DataError: the chain of hashes is broken, or the ledger belongs to another `fingerprint`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger = cls(path, fingerprint, durable)
        with ledger.alone():
            if not ledger._log.lines:
                ledger._log.append({"format": FORMAT, "data": fingerprint})
        return ledger

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block, the ledger is up to date and locked for other processes.

        Their earlier charges are in `spent`, and further ones wait, so that a decision by `spent` holds until
        the block ends. Blocks may be nested.

        Raises:
            DataError: the file was tampered with.
        """
        with self._log.alone():
            yield

    def charge(self, entry: Entry) -> None:
        """Write an entry and wait until it is on disk; only then may the release leave."""
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
        """The releases that one job (or run) was charged for, by kind."""
        return self._of_job.get(job, Counter())

    def has(self, job: str, round: int) -> bool:
        """Whether this round of the job was charged."""
        return round in self._rounds.get(job, ())

    def rounds_of(self, job: str) -> Counter[int]:
        """How many times each round of the job was charged."""
        return self._rounds.get(job, Counter())

    def data_of(self, job: str) -> set[str]:
        """The fingerprints of the data that the job was charged on."""
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
