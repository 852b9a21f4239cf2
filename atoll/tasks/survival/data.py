"""Survival tables: for each patient a time, whether the event was observed then, and numeric features.

A row's features are stored in one cell, a number by name; other columns stay in the table, such as the
hospital by which rows are partitioned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import Field, model_validator

from atoll.data.columns import role_column, values_of
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.parsers import number_cell
from atoll.data.schema import Schema, SchemaField, chosen_name
from atoll.data.tables import Rows, read_file
from atoll.errors import ConfigError, DataError
from atoll.job.job import DataSection
from atoll.job.section import Positive, Section

FEATURE = "feature "
"""Prefix of a feature's name while it is read as a column of its own."""
MOST_FEATURES = 100_000


class SurvivalOptions(Section):
    """`task.options` of survival: which columns are features, and how they are standardised.

    Without `features`, every numeric column is a feature except time, event and the column by which rows are
    partitioned. With `means` and `deviations`, in the order of `features`, values are replaced by
    (value - mean) / deviation; without them they stay unchanged.
    """

    features: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_FEATURES)] | None = None
    means: tuple[Annotated[float, Field(allow_inf_nan=False)], ...] | None = None
    deviations: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _the_scale_is_of_the_features(self) -> SurvivalOptions:
        names = self.features or ()
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"features: {twice!r} is there twice, expected different names")
        if (self.means is None) != (self.deviations is None):
            missing = "means" if self.means is None else "deviations"
            raise ValueError(f"{missing}: missing, expected both means and deviations, or neither")
        for key in ("means", "deviations"):
            is_set = getattr(self, key)
            if is_set is not None and len(is_set) != len(names):
                raise ValueError(
                    f"{key}: {len(is_set)} numbers for {len(names)} features, expected one for each of"
                    " task.options.features"
                )
        return self

    @property
    def scale(self) -> dict[str, tuple[float, float]]:
        """(mean, deviation) by feature; empty if features aren't standardised."""
        if self.features is None or self.means is None or self.deviations is None:
            return {}
        return dict(zip(self.features, zip(self.means, self.deviations, strict=True), strict=True))


def time_cell(cell: Any, where: str) -> float:
    """The time in a cell, at least 0.

    Raises:
        DataError: the cell is empty, or no finite number of at least 0.
    """
    value = number_cell(cell, f"{where}: time")
    if value < 0:
        raise DataError(f"{where}: time: {value:g}, expected 0 or more")
    return value


def event_cell(cell: Any, where: str) -> bool:
    """Whether the event was observed; the cell holds true or false, 1 or 0, also as text.

    >>> event_cell("1.0", "row 1"), event_cell("false", "row 2")
    (True, False)

    Raises:
        DataError: the cell is empty or holds another value.
    """
    written = str(cell).strip().lower()
    if written in ("true", "false"):
        return written == "true"
    expected = "expected 1 (seen), 0 (censored), true or false"
    try:
        value = number_cell(cell, "")
    except DataError:
        text = "nothing" if cell is None or cell == "" else repr(shown(str(cell)))
        raise DataError(f"{where}: event: {text}, {expected}") from None
    if value not in (0, 1):
        raise DataError(f"{where}: event: {value:g}, {expected}")
    return value == 1


def feature_cell(name: str) -> Callable[[Any, str], float]:
    """A parser of one feature's cells: finite numbers, and truth values, which become 1 or 0."""

    def read(cell: Any, where: str) -> float:
        return float(cell) if isinstance(cell, bool) else number_cell(cell, f"{where}: {name}")

    return read


def features_cell(names: Sequence[str]) -> Callable[[Any, str], dict[str, float]]:
    """A parser of cells with all features, {name: number}, none of which may be missing."""
    readers = {name: feature_cell(name) for name in names}

    def read(cell: Any, where: str) -> dict[str, float]:
        if not isinstance(cell, Mapping):
            raise DataError(f"{where}: features: {type(cell).__name__}, expected a number for each name")
        return {name: one(cell.get(name), where) for name, one in readers.items()}

    return read


TIME = SchemaField(
    "time",
    time_cell,
    pa.float64(),
    ("t", "duration", "survival_time", "os_time", "time_to_event", "followup", "follow_up"),
)
EVENT = SchemaField(
    "event", event_cell, pa.bool_(), ("e", "status", "observed", "died", "dead", "death", "os_event")
)


def patients(names: Sequence[str]) -> Schema:
    """The schema of a table with one row per patient and all features in one cell."""
    kind = pa.struct([(name, pa.float64()) for name in names])
    return Schema((TIME, EVENT, SchemaField("features", features_cell(names), kind)))


def gathered(
    source: Path, data: DataSection, options: SurvivalOptions, diagnostics: Diagnostics
) -> dict[str, pa.Table]:
    """The tables at a path by split, with features in one cell: as shards are written, or read from columns.

    Raises:
        DataError: there is no data, or rows are invalid.
    """
    plain = Schema((TIME, EVENT))
    rows = plain.first_rows(source)
    if rows is not None and "features" in rows.table.column_names:
        return patients(options.features or _fields(rows)).gather(source, data, diagnostics)
    plain.check(data)
    names = options.features or (numeric_columns(rows, data) if rows is not None else [])
    if options.features is None and names:
        diagnostics.warning(f"features are {', '.join(names)}; task.options.features can name others")
    readers = [SchemaField(FEATURE + name, feature_cell(name), pa.float64()) for name in names]
    exact = {FEATURE + name: name for name in names}
    named = data.model_copy(update={"columns": {**data.columns, **exact}})
    read = Schema((TIME, EVENT, *readers)).gather(source, named, diagnostics)
    return {split: in_one_cell(table, names, FEATURE) for split, table in read.items()}


def rows_to_score(path: Path, features: Sequence[str] | None) -> dict[str, dict[str, float]]:
    """The features of each patient in a table, {name: number}, by row ("row 1"); without time and event.

    Without `features`, every column in which all cells are numbers is a feature.

    Raises:
        DataError: the table can't be read or is empty, or a feature is missing or not a number in some row.
    """
    diagnostics = Diagnostics()
    rows = read_file(path, diagnostics)
    diagnostics.close()
    if missing := [name for name in features or () if name not in rows.table.column_names]:
        raise DataError(
            f"{rows.name}: columns {rows.table.column_names}, expected the feature {missing[0]!r}"
        )
    readers = {name: feature_cell(name) for name in features or _wholly_numbers(rows)}
    columns = {name: values_of(rows, name).to_pylist() for name in readers}
    if not rows.table.num_rows:
        raise DataError(f"{rows.name}: no rows, expected one for each patient")
    return {
        f"row {place + 1}": {
            name: read(columns[name][place], rows.where(place)) for name, read in readers.items()
        }
        for place in range(rows.table.num_rows)
    }


def _wholly_numbers(rows: Rows) -> list[str]:
    """The names of the columns in which every cell is a number or a truth value."""
    columns = {name: values_of(rows, name) for name in rows.table.column_names}
    return [
        name
        for name, column in columns.items()
        if _is_numeric(column.type) or (_is_text(column.type) and all(map(_is_number, column.to_pylist())))
    ]


def in_one_cell(table: pa.Table, names: Sequence[str], prefix: str = "") -> pa.Table:
    """The table with the columns `prefix + name` replaced by a single column `features`."""
    columns = [table.column(prefix + name).cast(pa.float64()).combine_chunks() for name in names]
    features = pa.StructArray.from_arrays(columns, names=list(names))
    return table.drop_columns([prefix + name for name in names]).append_column("features", features)


def _fields(rows: Rows) -> list[str]:
    kind = rows.table.schema.field("features").type
    return sorted(field.name for field in kind) if pa.types.is_struct(kind) else []


def numeric_columns(rows: Rows, data: DataSection) -> list[str]:
    """The numeric columns, sorted, without time, event and the column by which rows are partitioned.

    A text column counts as numeric if at least half of its cells are numbers; the others are then errors.

    Raises:
        DataError: there is no such column, or no column for the time or the event.
    """
    usual = {role.name: (role.name, *role.usual) for role in (TIME, EVENT)}
    taken = {role_column(rows, role, chosen_name(data, role), names) for role, names in usual.items()}
    taken.add(getattr(data.partition, "by", None))
    rest = [name for name in rows.table.column_names if name not in taken]
    numeric = sorted(name for name in rest if _holds_numbers(values_of(rows, name)))
    if not numeric:
        raise DataError(
            f"{rows.name}: columns {rows.table.column_names}, expected some of numbers as features"
        )
    return numeric


def _holds_numbers(column: pa.ChunkedArray) -> bool:
    if not _is_text(column.type):
        return _is_numeric(column.type)
    cells = [cell for cell in column.to_pylist() if cell not in (None, "")]
    return bool(cells) and 2 * sum(map(_is_number, cells)) >= len(cells)


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(cell: str) -> bool:
    try:
        number_cell(cell, "")
    except DataError:
        return False
    return True


def same_features(all_names: Iterable[Sequence[str]]) -> list[str]:
    """The features of all clients, in the first client's order.

    Raises:
        ConfigError: two clients have different features.
    """
    first, *others = all_names
    for other in others:
        if apart := sorted(set(first) ^ set(other)):
            raise ConfigError(
                f"task.options.features: clients have different columns of numbers: {', '.join(apart[:5])}"
                " at some only; expected the names of those that all have"
            )
    return list(first)
