"""Cutting dated series into windows: a history of values, and the values that follow it.

Rows of a series are sorted by date and count as consecutive steps (also business days). Covariates that are
known for future dates (a calendar, a weather forecast) are given for history and horizon; those that are only
observed (traffic) for the history alone. The last part of the time is held out: no training window reaches
into it, and test windows forecast only steps in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from atoll.data.diagnostics import Counts, Diagnostics
from atoll.data.parsers import list_cell, name_cell, number_cell
from atoll.data.schema import Schema, SchemaField
from atoll.errors import DataError
from atoll.job.job import DataSection
from atoll.job.section import Between, Count, Section
from atoll.tasks.moments import MomentReader, gaps, in_time, moment_text, moments_after

Values = NDArray[np.float64]


class ForecastOptions(Section):
    """`task.options` of forecasting: the lengths of windows, their covariates and the quantiles to predict.

    `history`, `horizon`, `season` and `stride`, the distance of two windows' starts, are in steps. `observed`
    and `known` are names of columns.
    """

    history: Annotated[int, Field(ge=2, le=10_000)] = 28
    horizon: Annotated[int, Field(ge=1, le=10_000)] = 7
    season: Annotated[int, Field(ge=1, le=10_000)] = 7
    stride: Count = 1
    observed: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    quantiles: Annotated[tuple[Between, ...], Field(min_length=1)] = (0.1, 0.5, 0.9)


def dated(options: ForecastOptions, time_format: str | None = None) -> Schema:
    """The schema of a table with one row per step of each series; use a new one for each reading."""
    return Schema(
        (
            SchemaField(
                "series", name_cell, pa.string(), ("id", "name", "symbol", "ticker", "store"), required=False
            ),
            SchemaField(
                "date",
                MomentReader(time_format),
                pa.string(),
                ("time", "timestamp", "day", "datetime", "ds"),
            ),
            SchemaField(
                "value", number_cell, pa.float64(), ("target", "y", "close", "price", "sales", "demand")
            ),
            *(SchemaField(name, number_cell, pa.float64()) for name in (*options.observed, *options.known)),
        ),
        count_by="series",
    )


_NUMBERS = list_cell(number_cell)
WINDOWS = Schema(
    (
        SchemaField("series", name_cell, pa.string()),
        SchemaField("first", moment_text, pa.string()),
        SchemaField("last", moment_text, pa.string()),
        SchemaField("history", _NUMBERS, pa.list_(pa.float64())),
        SchemaField("future", _NUMBERS, pa.list_(pa.float64())),
        SchemaField("observed", _NUMBERS, pa.list_(pa.float64())),
        SchemaField("known", _NUMBERS, pa.list_(pa.float64())),
    ),
    count_by="series",
)
"""The schema of a table with one row per window.

`first` and `last` are the dates of the first and last step to forecast. `observed` and `known` hold the
covariates step by step, over the history, and over history and horizon.
"""


@dataclass(frozen=True)
class _Series:
    """One series sorted by date: values [steps], covariates `observed` and `known` [steps, columns]."""

    name: str
    dates: list[str]
    values: Values
    observed: Values
    known: Values
    rest: dict[str, Any]


def windows_of(
    table: pa.Table,
    options: ForecastOptions,
    test_fraction: float,
    origin: str,
    diagnostics: Diagnostics,
) -> dict[str, pa.Table]:
    """Tables of training windows ("train") and, if `test_fraction` is above 0, test windows ("test").

    `test_fraction` is the part of the dates that is held out at the end. Missing steps of a series are
    reported to `diagnostics`, and steps that are in no window are counted there.

    Raises:
        DataError: two rows of a series have the same date, or no series is long enough for a window.
    """
    series = _apart(table, options, origin)
    _remark_gaps(series, diagnostics)
    dates = sorted({date for one in series for date in one.dates}, key=in_time)
    cut = dates[min(len(dates) - 1, round(len(dates) * (1 - test_fraction)))] if test_fraction else None
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    across = 0
    for one in series:
        used = np.zeros(len(one.dates), dtype=bool)
        for start, row in _windows(one, options):
            if cut is None or in_time(row["last"]) < in_time(cut):
                rows["train"].append(row)
            elif in_time(row["first"]) >= in_time(cut):
                rows["test"].append(row)
            else:
                across += 1
                continue
            used[start : start + options.history + options.horizon] = True
        _count_steps(used, options, diagnostics)
    if not rows["train"]:
        need = options.history + options.horizon
        held = f" before {cut}, where the test part begins" if test_fraction else ""
        raise DataError(
            f"{origin}: {len(series)} series with at most {max(len(one.dates) for one in series)} steps,"
            f" expected one with {need} (history and horizon){held}"
        )
    made = sum(map(len, rows.values()))
    lost = {"across the start of the test part": across} if across else {}
    diagnostics.counts.append(Counts("windows", made + across, made, lost))
    return {split: _as_table(windows) for split, windows in rows.items() if windows}


def _count_steps(used: NDArray[np.bool_], options: ForecastOptions, diagnostics: Diagnostics) -> None:
    """Count in `diagnostics` the steps of one series that are in a window, and those that aren't."""
    diagnostics.use_rows(int(used.sum()))
    need = options.history + options.horizon
    why = f"of series with fewer than {need} steps" if len(used) < need else "in no window"
    diagnostics.leave_out(why, int((~used).sum()))


def _remark_gaps(series: list[_Series], diagnostics: Diagnostics) -> None:
    for one in series:
        for gap in gaps(one.dates):
            diagnostics.warning(
                "steps are missing, and rows on both sides count as neighbours", f"series {one.name!r}: {gap}"
            )


def _apart(table: pa.Table, options: ForecastOptions, origin: str) -> list[_Series]:
    has_names = "series" in table.column_names
    names = table.column("series").to_pylist() if has_names else ["series"] * table.num_rows
    marks = list(zip(names, map(in_time, table.column("date").to_pylist()), strict=True))
    order = sorted(range(table.num_rows), key=marks.__getitem__)
    table = table.take(pa.array(order, pa.int64()))
    names = [names[row] for row in order]
    dates = table.column("date").to_pylist()
    for before, after in zip(range(len(names) - 1), range(1, len(names)), strict=True):
        if names[before] == names[after] and dates[before] == dates[after]:
            raise DataError(
                f"{origin}: series {names[after]!r} has {dates[after]} twice, expected a row a step"
            )
    used = {"series", "date", "value", *options.observed, *options.known}
    rest = [name for name in table.column_names if name not in used]
    starts = [row for row in range(len(names)) if not row or names[row] != names[row - 1]]
    return [
        _Series(
            names[start],
            dates[start:end],
            _columns(part := table.slice(start, end - start), ("value",))[:, 0],
            _columns(part, options.observed),
            _columns(part, options.known),
            {name: part.column(name)[0].as_py() for name in rest},
        )
        for start, end in zip(starts, [*starts[1:], len(names)], strict=True)
    ]


def _columns(table: pa.Table, names: tuple[str, ...]) -> Values:
    if not names:
        return np.zeros((table.num_rows, 0))
    return np.stack([table.column(name).to_numpy() for name in names], axis=1)


def _windows(one: _Series, options: ForecastOptions) -> list[tuple[int, dict[str, Any]]]:
    """(index of the first step, window as a row) for each window of a series."""
    length, horizon = options.history, options.horizon
    starts = range(0, len(one.dates) - length - horizon + 1, options.stride)
    return [(start, _window(one, start, length, horizon)) for start in starts]


def _window(one: _Series, start: int, length: int, horizon: int) -> dict[str, Any]:
    return {
        "series": one.name,
        "first": one.dates[start + length],
        "last": one.dates[start + length + horizon - 1],
        "history": one.values[start : start + length].tolist(),
        "future": one.values[start + length : start + length + horizon].tolist(),
        "observed": one.observed[start : start + length].ravel().tolist(),
        "known": one.known[start : start + length + horizon].ravel().tolist(),
    } | one.rest


def _as_table(rows: list[dict[str, Any]]) -> pa.Table:
    kinds = {role.name: role.kind for role in WINDOWS.roles}
    return pa.table({name: pa.array([row[name] for row in rows], kinds.get(name)) for name in rows[0]})


def last_windows(
    path: Path, options: ForecastOptions, time_format: str | None = None
) -> dict[str, dict[str, Any]]:
    """The last window of each series in a file, by the series' name, to forecast the steps after it.

    A file without names has one series, called "". Windows also hold `dates`, those of the history, and
    `ahead`, those of the horizon: from the file, or computed if the history's are evenly spaced. Future rows
    have no value, only known covariates.

    Raises:
        DataError: a series has too few rows with a value, or too few rows after its last value.
    """
    roles = [
        SchemaField(r.name, _number_or_none, r.kind, r.usual) if r.name == "value" else r
        for r in dated(options, time_format).roles
    ]
    diagnostics = Diagnostics()
    table = Schema(tuple(roles)).gather(path, DataSection(source=str(path)), diagnostics)
    diagnostics.close()
    series = _apart(table["train"], options, str(path))
    if "series" not in table["train"].column_names:
        return {"": _last_window(series[0], options, str(path))}
    return {one.name: _last_window(one, options, f"{path}: series {one.name!r}") for one in series}


def _last_window(one: _Series, options: ForecastOptions, where: str) -> dict[str, Any]:
    values = [None if math.isnan(value) else value for value in one.values.tolist()]
    seen = len(values) - next((n for n, v in enumerate(reversed(values)) if v is not None), len(values))
    ahead = options.horizon if options.known else 0
    if seen < options.history or None in values[:seen] or len(values) - seen < ahead:
        raise DataError(
            f"{where}: {seen} rows with a value and {len(values) - seen} behind them, expected at least"
            f" {options.history} and {ahead} (what is known of the steps to come)"
        )
    start, end = seen - options.history, seen + options.horizon
    dates = one.dates[start:seen]
    written = one.dates[seen:end]
    return {
        "history": values[start:seen],
        "observed": one.observed[start:seen].ravel().tolist(),
        "known": one.known[start:end].ravel().tolist(),
        "dates": dates,
        "ahead": written if len(written) == options.horizon else moments_after(dates, options.horizon),
    }


def _number_or_none(cell: Any, where: str) -> float | None:
    return None if cell is None or cell == "" else number_cell(cell, where)
