"""Parsing columns of times: each cell, called a moment, becomes one normalised text.

A moment is a number (a step, seconds since 1970), a date or time in ISO 8601, or a text in the format of
`data.time_format`. Times with a UTC offset are converted to UTC; others stay unchanged. All moments of a
column must be of the same kind.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from atoll.data.diagnostics import shown
from atoll.errors import DataError

_WHOLE = re.compile(r"[-+]?\d+(\.0*)?")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
NUMBER, NAIVE, OFFSET = "a number", "a time without an offset", "a time with an offset"

GAP = 1.5
"""A distance of more than this many usual steps is a gap: months differ by less, a missing day makes more."""


@dataclass
class MomentReader:
    """Parses the cells of one column of times; `format` is the strptime format of text that isn't ISO 8601.

    >>> read = MomentReader()
    >>> read("2024-10-27T02:30+02:00", "line 2"), read("2024-10-27T02:30+01:00", "line 3")
    ('2024-10-27T00:30:00', '2024-10-27T01:30:00')
    >>> MomentReader("%d.%m.%Y")("9.1.2024", "line 2")
    '2024-01-09'
    """

    format: str | None = None
    _first: tuple[str, str] | None = field(default=None, repr=False)

    def __call__(self, cell: Any, where: str) -> str:
        """The cell's moment as normalised text; `where` is the cell's place, for error messages.

        Raises:
            DataError: the cell is no moment, or of another kind than the column's first one.
        """
        kind, text = _kind_and_text(cell, self.format, where)
        first_kind, first_place = self._first = self._first or (kind, where)
        if kind != first_kind:
            raise DataError(
                f"{where}: {shown(str(cell))!r} is {kind}, expected {first_kind} as in {first_place}"
            )
        return text


def _kind_and_text(cell: Any, format: str | None, where: str) -> tuple[str, str]:
    if isinstance(cell, str):
        cell = _parsed(cell.strip(), format, where)
    if isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell):
        return NUMBER, str(int(cell)) if cell == int(cell) else repr(cell)
    if isinstance(cell, datetime.datetime) and cell == cell:  # pandas' NaT equals nothing
        kind = NAIVE if cell.utcoffset() is None else OFFSET
        return kind, _text_of(cell.astimezone(datetime.UTC).replace(tzinfo=None) if kind == OFFSET else cell)
    if isinstance(cell, datetime.date) and cell == cell:
        return NAIVE, cell.isoformat()
    raise DataError(f"{where}: {'nothing' if cell is None else shown(str(cell))}, {_expected(format)}")


def _parsed(text: str, format: str | None, where: str) -> int | float | datetime.date:
    try:
        if format is not None:
            return datetime.datetime.strptime(text, format)
        if _WHOLE.fullmatch(text):
            return int(text.partition(".")[0])
        if _NUMBER.fullmatch(text):
            return float(text)
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        raise DataError(f"{where}: {shown(text[:60])!r}, {_expected(format)}") from None


def _expected(format: str | None) -> str:
    if format is not None:
        return f"expected a time as data.time_format = {format!r} says"
    return (
        "expected a time: a number, or ISO 8601 such as 2024-03-01 or 2024-03-01T12:30+02:00"
        " (data.time_format says how others are written)"
    )


def _text_of(moment: datetime.datetime) -> str:
    """The time in ISO 8601; midnight becomes the date alone, so that both spellings are equal."""
    return moment.date().isoformat() if moment.time() == datetime.time() else moment.isoformat()


def moment_text(cell: Any, where: str) -> str:
    """The normalised text of a single moment, also one that is normalised already."""
    return MomentReader()(cell, where)


def in_time(text: str) -> tuple[int | float, str]:
    """A sort key for the moments of a column: numbers by value, dates and times by their text.

    >>> sorted(["10", "9", "9.5"], key=in_time)
    ['9', '9.5', '10']
    """
    try:
        return (int(text) if _WHOLE.fullmatch(text) and "." not in text else float(text)), ""
    except ValueError:
        return 0, text


@dataclass(frozen=True)
class Gap:
    """A place where rows are missing in a series: the moments on both sides, and how far apart they are."""

    before: str
    after: str
    length: str
    step: str

    def __str__(self) -> str:
        return f"{self.length} from {self.before} to {self.after}, where a step is {self.step}"


def gaps(moments: Sequence[str]) -> Iterator[Gap]:
    """The gaps between sorted moments; weekends are no gaps if no moment is on a weekend.

    >>> [str(gap) for gap in gaps(["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-05"])]
    ['2 days from 2024-01-03 to 2024-01-05, where a step is 1 day']
    """
    if len(moments) < 3:
        return
    steps = _steps(moments)
    usual = Counter(steps).most_common(1)[0][0]
    for place, step in enumerate(steps):
        if step > GAP * usual:
            unit = _unit(moments)
            yield Gap(moments[place], moments[place + 1], _length(step, unit), _length(usual, unit))


def moments_after(moments: Sequence[str], count: int) -> list[str]:
    """The next `count` moments after sorted ones with equal steps; empty if steps differ, as for months.

    >>> moments_after(["2024-03-07", "2024-03-08", "2024-03-11"], 2)  # working days
    ['2024-03-12', '2024-03-13']
    >>> moments_after(["4", "6", "8"], 2), moments_after(["1", "2", "9"], 1)
    (['10', '12'], [])
    >>> moments_after(["2024-03-07T22:00:00", "2024-03-07T23:00:00"], 1)
    ['2024-03-08']
    """
    steps = _steps(moments)
    if not steps or len(set(steps)) > 1:
        return []
    step, unit, last = steps[0], _unit(moments), moments[-1]
    ahead = [step * (place + 1) for place in range(count)]
    if unit == "":
        return [f"{in_time(last)[0] + each:.15g}" for each in ahead]
    if unit == "second":
        start = datetime.datetime.fromisoformat(last)
        return [_text_of(start + datetime.timedelta(seconds=each)) for each in ahead]
    if bool(np.is_busday(np.array(moments, dtype="datetime64[D]")).all()):
        return [str(np.busday_offset(np.datetime64(last, "D"), int(each))) for each in ahead]
    return [str(np.datetime64(last, "D") + int(each)) for each in ahead]


def _steps(moments: Sequence[str]) -> list[float]:
    """The distance from each moment to the next: in numbers, days (working days if all are) or seconds."""
    unit = _unit(moments)
    if unit == "":
        numbers = [in_time(moment)[0] for moment in moments]
        return [after - before for before, after in pairwise(numbers)]
    times = np.array(moments, dtype="datetime64[us]")
    if unit == "second":
        return [float(step) for step in np.diff(times) / np.timedelta64(1, "s")]
    days = times.astype("datetime64[D]")
    if bool(np.is_busday(days).all()):
        return [float(step) for step in np.busday_count(days[:-1], days[1:])]
    return [float(step) for step in np.diff(days) / np.timedelta64(1, "D")]


def _unit(moments: Sequence[str]) -> str:
    """The unit of steps: "" for numbers, "second" if any moment has a time of day, else "day"."""
    if not any("-" in moment[1:] for moment in moments[:1]):
        return ""
    return "second" if any("T" in moment for moment in moments) else "day"


def _length(step: float, unit: str) -> str:
    """A step as text, in the largest unit of which it is a whole number.

    >>> _length(7200.0, "second"), _length(3.0, "day"), _length(2.0, "")
    ('2 hours', '3 days', '2')
    """
    for seconds, name in ((86400, "day"), (3600, "hour"), (60, "minute")) if unit == "second" else ():
        if step % seconds == 0:
            step, unit = step / seconds, name
            break
    return f"{step:g}" + (f" {unit}" if unit else "") + ("s" if unit and step != 1 else "")
