"""Tables of survival: a time, whether the event was seen then, and numbers that may explain it.

A row's features are one cell, a number for each name; what else is in the table stays beside them, such as
the hospital by which rows are dealt.
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
"""Before a feature's name, where it is read as a column of its own."""
MOST_FEATURES = 100_000


class SurvivalOptions(Section):
    """`task.options` of survival: which columns are features, and what is taken from them before they count.

    Without `features` every column of numbers is one, but time, event and the one that rows are dealt by.
    With `means` and `deviations`, in the order of `features`, (value - mean) / deviation is learnt from;
    without them the values as they are.
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
        """(mean, deviation) by feature; none where the values are learnt from as they are."""
        if self.features is None or self.means is None or self.deviations is None:
            return {}
        return dict(zip(self.features, zip(self.means, self.deviations, strict=True), strict=True))


def time_cell(cell: Any, where: str) -> float:
    """A time that isn't negative.

    Raises:
        DataError: it is missing, or something else.
    """
    value = number_cell(cell, f"{where}: time")
    if value < 0:
        raise DataError(f"{where}: time: {value:g}, expected 0 or more")
    return value


def event_cell(cell: Any, where: str) -> bool:
    """Whether the event was seen: a truth value, 1 or 0, also as text.

    >>> event_cell("1.0", "row 1"), event_cell("false", "row 2")
    (True, False)

    Raises:
        DataError: it is missing, or something else.
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
    """A reader of one feature: a finite number, or a truth value, which becomes 1 or 0."""

    def read(cell: Any, where: str) -> float:
        return float(cell) if isinstance(cell, bool) else number_cell(cell, f"{where}: {name}")

    return read


def features_cell(names: Sequence[str]) -> Callable[[Any, str], dict[str, float]]:
    """A reader of all features together: {name: number}, of which none is missing."""
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
    """A row for each patient, whose features are one cell."""
    kind = pa.struct([(name, pa.float64()) for name in names])
    return Schema((TIME, EVENT, SchemaField("features", features_cell(names), kind)))


def gathered(
    source: Path, data: DataSection, options: SurvivalOptions, diagnostics: Diagnostics
) -> dict[str, pa.Table]:
    """The splits at a path: as shards are written, or from a table with a column for each feature."""
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
    """The patients of a table, {name: number} by the rows' places in it; time and event need not be there.

    Without `features` every column is taken of which every cell is a number.

    Raises:
        DataError: it can't be read or has no rows; or a feature isn't there, or isn't a number, in some row.
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
    """The columns in which every cell is a number or a truth value."""
    columns = {name: values_of(rows, name) for name in rows.table.column_names}
    return [
        name
        for name, column in columns.items()
        if _is_numeric(column.type) or (_is_text(column.type) and all(map(_is_number, column.to_pylist())))
    ]


def in_one_cell(table: pa.Table, names: Sequence[str], prefix: str = "") -> pa.Table:
    """The table with one column `features` in the place of those that are called as a prefix and a name."""
    columns = [table.column(prefix + name).cast(pa.float64()).combine_chunks() for name in names]
    features = pa.StructArray.from_arrays(columns, names=list(names))
    return table.drop_columns([prefix + name for name in names]).append_column("features", features)


def _fields(rows: Rows) -> list[str]:
    kind = rows.table.schema.field("features").type
    return sorted(field.name for field in kind) if pa.types.is_struct(kind) else []


def numeric_columns(rows: Rows, data: DataSection) -> list[str]:
    """The columns of numbers, sorted, without time, event and the one that rows are dealt by.

    A column of texts is one of numbers where at least half of its cells are: the others are then faults.

    Raises:
        DataError: there are none, or none that can be the time or the event.
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
    """The features that all clients have, in the first one's order.

    Raises:
        ConfigError: two clients have different ones.
    """
    first, *others = all_names
    for other in others:
        if apart := sorted(set(first) ^ set(other)):
            raise ConfigError(
                f"task.options.features: clients have different columns of numbers: {', '.join(apart[:5])}"
                " at some only; expected the names of those that all have"
            )
    return list(first)
