"""What is wrong or remarkable in one shard, and how much of it is used, so that all is told at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from atoll.errors import DataError, JobError

MOST_COUNTS = 20
"""Units, and reasons of one unit, that another machine may tell."""

MOST_COUNT_CHARACTERS = 100
"""Of a unit and of a reason of another machine."""


@dataclass(frozen=True)
class Counts:
    """How many of one kind were read and are used, and how many are left out by the reason.

    `unit` is what is counted, in the plural: examples, or what examples are made of (rows, users). A reason
    stands behind its number: "25 with fewer than 4 rows".

    >>> Counts("users", 300, 275, {"with fewer than 4 rows": 25}).description
    '300 users read, 275 used; left out: 25 with fewer than 4 rows'

    Raises:
        JobError: they don't add up, which is a fault of the program.
    """

    unit: str
    read: int
    used: int
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.read != self.used + sum(self.left_out.values()) or min(self.used, 0) < 0:
            raise JobError(f"the counts don't add up: {self.description}")

    @property
    def description(self) -> str:
        """One line."""
        if not self.left_out:
            return f"{self.read} {self.unit} read, all used"
        why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{self.read} {self.unit} read, {self.used} used; left out: {why}"

    @property
    def as_json(self) -> dict[str, Any]:
        """As `result.json` and a greeting hold them."""
        return asdict(self)


def counts_from_json(written: Sequence[Any]) -> tuple[Counts, ...]:
    """Read what `as_json` made, on another machine.

    Raises:
        DataError: it has another form, or doesn't add up.
    """
    try:
        counts = tuple(Counts(**one) for one in written)
    except (JobError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"counts of another form ({type(error).__name__})") from None
    if len(counts) > MOST_COUNTS or not all(map(_is_sound, counts)):
        raise DataError(
            f"counts of another form, expected whole numbers and at most {MOST_COUNTS} short reasons"
        )
    return counts


def _is_sound(one: Counts) -> bool:
    texts, numbers = [one.unit, *one.left_out], [one.read, one.used, *one.left_out.values()]
    short = all(isinstance(t, str) and t.isprintable() and len(t) <= MOST_COUNT_CHARACTERS for t in texts)
    return short and len(texts) <= MOST_COUNTS and all(type(n) is int and 0 <= n < 2**53 for n in numbers)


def those_left(left_out: Mapping[str, int]) -> dict[str, int]:
    """The reasons for which something is left out."""
    return {reason: count for reason, count in left_out.items() if count}


def total(counts: Iterable[Counts]) -> tuple[Counts, ...]:
    """The counts of several clients together, one for each unit, in the order in which units come."""
    by_unit: dict[str, list[Counts]] = {}
    for one in counts:
        by_unit.setdefault(one.unit, []).append(one)
    return tuple(_sum(unit, unit_counts) for unit, unit_counts in by_unit.items())


def _sum(unit: str, counts: Sequence[Counts]) -> Counts:
    left_out: dict[str, int] = {}
    for one in counts:
        for reason, count in one.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return Counts(unit, sum(one.read for one in counts), sum(one.used for one in counts), left_out)


def shown(path: Path | str) -> str:
    """A name fit for one line of a message, whatever bytes it is made of."""
    name = str(path)
    return name if name.isprintable() else ascii(name)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, open to be read; whatever the system says against it names the file."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        why = (error.strerror or type(error).__name__).lower()
        raise DataError(f"{shown(path)}: cannot be read: {why}; expected a readable file") from None


@dataclass
class Diagnostics:
    """The bad examples of a shard, one line each, its remarks by kind, and how much of it is used.

    `rows_read` are rows as they were found; `rows_used` those of them that are in an example, where a row
    isn't one itself. `counts` are those of what examples are made of besides: users, windows.
    """

    problems: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_used: int | None = None
    counts: list[Counts] = field(default_factory=list)
    _left_out: dict[str, int] = field(default_factory=dict)
    _remarks: dict[str, list[str]] = field(default_factory=dict)

    def error(self, problem: DataError) -> None:
        self.problems.append(str(problem))

    def warning(self, what: str, where: str = "") -> None:
        self._remarks.setdefault(what, []).append(where)

    def leave_out(self, why: str, count: int) -> None:
        """Rows that were read are in no example; `why` stands behind their number."""
        self._left_out[why] = self._left_out.get(why, 0) + count

    def use_rows(self, count: int) -> None:
        """So many more rows are in an example, of those that examples are made of."""
        self.rows_used = (self.rows_used or 0) + count

    def counts_of(self, examples: int) -> tuple[Counts, ...]:
        """What became of a shard's rows, which are so many examples unless examples are made of them."""
        made = self.rows_used is not None
        unit, used = ("rows", self.rows_used or 0) if made else ("examples", examples)
        return (Counts(unit, self.rows_read, used, those_left(self._left_out)), *total(self.counts))

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(_note(what, places) for what, places in self._remarks.items())

    def close(self) -> None:
        """Raise the first problem, with the count of all, unless there is none."""
        if not self.problems:
            return
        count = len(self.problems)
        more = "" if count == 1 else f" (the first of {count} bad examples; `atoll check` lists them)"
        raise DataError(self.problems[0] + more)


def _note(what: str, places: list[str]) -> str:
    named = [place for place in places if place]
    if not named:
        return what
    return f"{what}: {named[0]}" + (f" and {len(named) - 1} more" if len(named) > 1 else "")
