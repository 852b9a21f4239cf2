"""Which column is the text, the image or the label, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from atoll.data.diagnostics import Diagnostics
from atoll.data.images import Depth
from atoll.data.tables import Rows
from atoll.errors import DataError

_USUAL = {
    "text": ("text", "sentence", "content", "review", "document", "body", "message", "article"),
    "image": ("image", "img", "file", "file_name", "filename", "filepath", "path", "picture", "photo"),
    "label": ("label", "labels", "class", "category", "target", "y", "topic", "sentiment"),
}


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are learnt from; None is found by its usual names."""

    text: str | None = None
    image: str | None = None
    label: str | None = None
    depth: Depth | None = None
    """How grey pictures of more than 8 bits are seen."""


DEFAULT_COLUMNS = Columns()


def column_name(rows: Rows, role: str, chosen: str | None) -> str:
    """The column of `rows` that plays `role`: the chosen one, or the only one with a usual name."""
    if rows.is_canonical:
        return role
    name = role_column(rows, role, chosen, _USUAL[role])
    assert name is not None, "a required role has a column, or is refused"
    return name


def role_column(
    rows: Rows, role: str, chosen: str | None, usual: Sequence[str], *, required: bool = True
) -> str | None:
    """As `column_name`, for any role; None where one that isn't required has no column.

    Raises:
        DataError: there is no such column, or several could be it.
    """
    names: list[str] = rows.table.column_names
    if chosen is not None:
        if chosen not in names:
            raise DataError(f"{rows.name}: columns {names}, expected one called {chosen!r} as the {role}")
        return chosen
    matching = [name for name in names if name.strip().lower() in usual]
    matching = [role] if role in matching and role not in _USUAL else matching
    if len(matching) == 1:
        return matching[0]
    is_own = role in _USUAL
    key, option = (
        (f"data.{role}", f"--{role}") if is_own else (f"data.columns.{role}", f"--column {role}=NAME")
    )
    if matching:
        raise DataError(
            f"{rows.name}: columns {matching} could each be the {role}, expected its name as {key}"
        )
    if not required:
        return None
    raise DataError(
        f"{rows.name}: columns {names}, expected one for the {role} (such as {', '.join(usual)});"
        f" its name can be given as {key}, or to atoll check as {option}"
    )


def text_column(rows: Rows, name: str) -> pa.ChunkedArray:
    """The texts, as strings; a column of another type is refused."""
    column = _plain(rows, name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{rows.name}: column {name!r} is {column.type}, expected text")
    # As bytes, for whether a text is UTF-8 is said of its row, later.
    _check_sound(column.cast(pa.large_binary()), rows, name)
    return column.cast(pa.string())


def image_column(rows: Rows, name: str) -> pa.ChunkedArray:
    """The images as structs of bytes and path, without a copy of the bytes; paths are made absolute."""
    return file_column(rows, name, "images or their paths")


def file_column(rows: Rows, name: str, expected: str) -> pa.ChunkedArray:
    """Files as structs of bytes and path; `expected` says what else the column can't be."""
    column = _sound(rows, name)
    where = f"{rows.name}: column {name!r}"
    fields = [pa.field("bytes", pa.binary()), pa.field("path", pa.string())]
    structs = []
    for chunk in column.chunks or [pa.array([], column.type)]:
        data, paths = _bytes_and_paths(chunk, where, expected)
        structs.append(pa.StructArray.from_arrays([data, _absolute(paths, data, rows.folder)], fields=fields))
    return pa.chunked_array(structs)


def _absolute(paths: pa.Array, data: pa.Array, folder: Path) -> pa.Array:
    """Where the images lie that have no bytes; the path of one that has is only its name."""
    root = folder.absolute()
    pairs = zip(paths.to_pylist(), data.is_valid().to_pylist(), strict=True)
    return pa.array([path if held or not path else str(root / path) for path, held in pairs], pa.string())


def _bytes_and_paths(chunk: pa.Array, where: str, expected: str) -> tuple[pa.Array, pa.Array]:
    kind = chunk.type
    if pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}:
        # flatten() heeds that a whole struct may be null, field() doesn't.
        parts = dict(zip((field.name for field in kind), chunk.flatten(), strict=True))
        return parts["bytes"].cast(pa.binary()), parts["path"].cast(pa.string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.nulls(len(chunk), pa.binary()), chunk
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return chunk.cast(pa.binary()), pa.nulls(len(chunk), pa.string())
    raise DataError(f"{where} is {kind}, expected {expected}")


def values_of(rows: Rows, name: str) -> pa.ChunkedArray:
    """A column's values, seen to be sound."""
    return _sound(rows, name)


def label_values(rows: Rows, name: str) -> list[object]:
    """The labels as Python values, class indices still as indices."""
    values: list[object] = _sound(rows, name).to_pylist()
    return values


def other_columns(
    rows: Rows, used: Sequence[str], role: str, diagnostics: Diagnostics
) -> dict[str, pa.ChunkedArray]:
    """The scalar columns that are not learnt from, such as a user or a hospital; the rest is noted."""
    columns = {}
    for name in rows.table.column_names:
        if name in used:
            continue
        kind = _plain(rows, name).type
        if name in (role, "label") or not _is_scalar(kind):
            diagnostics.warning(f"column {name!r} ({kind}) is not kept", rows.name)
        else:
            columns[name] = _sound(rows, name)
    return columns


def _is_scalar(kind: pa.DataType) -> bool:
    checks = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string,
              pa.types.is_large_string, pa.types.is_temporal)  # fmt: skip
    return any(check(kind) for check in checks)


def _plain(rows: Rows, name: str) -> pa.ChunkedArray:
    """A column, with a dictionary's values in place of their indices."""
    column = rows.table.column(name)
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _sound(rows: Rows, name: str) -> pa.ChunkedArray:
    column = _plain(rows, name)
    _check_sound(column, rows, name)
    return column


def _check_sound(column: pa.ChunkedArray, rows: Rows, name: str) -> None:
    """Arrow trusts offsets and UTF-8 of a file that it maps, unless asked to look."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        message = str(error).splitlines()[0]
        raise DataError(f"{rows.name}: column {name!r}: {message}, expected sound Arrow data") from None
