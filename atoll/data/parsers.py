"""What a cell of a table may be, and what it becomes: text, numbers, names, lists."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable
from typing import Any

from atoll.data.diagnostics import shown
from atoll.data.labels import value_name
from atoll.data.texts import checked_text
from atoll.errors import DataError


def text_cell(cell: Any, where: str) -> str:
    """A text that isn't empty.

    Raises:
        DataError: it is missing, or something else.
    """
    if cell is not None and not isinstance(cell, str):
        raise DataError(f"{where}: {shown(str(cell))}, expected text")
    return checked_text(None if cell is None else cell.encode(), where)


def optional_text_cell(cell: Any, where: str) -> str:
    """A text, or nothing, which becomes an empty one."""
    return "" if cell is None or cell == "" else text_cell(cell, where)


def number_cell(cell: Any, where: str) -> float:
    """A finite number, also one written as text.

    Raises:
        DataError: it is missing, or no finite number.
    """
    if isinstance(cell, bool) or cell is None or cell == "":
        raise DataError(f"{where}: {'nothing' if cell in (None, '') else cell}, expected a number")
    try:
        value = float(cell)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {shown(str(cell))!r}, expected a number") from None
    if not math.isfinite(value):
        raise DataError(f"{where}: {value}, expected a finite number")
    return value


def name_cell(cell: Any, where: str) -> str:
    """An identifier: text, a whole number, a truth value or a date, each of which has one text.

    >>> name_cell("7", ""), name_cell(7.0, ""), name_cell("7.0", ""), name_cell(True, "")
    ('7', '7', '7', 'true')

    Raises:
        DataError: it is missing, or something else.
    """
    if isinstance(cell, str):
        text_cell(cell, where)
    elif isinstance(cell, float) and not cell.is_integer():
        raise DataError(f"{where}: {cell}, expected text or a whole number")
    elif cell is not None and not isinstance(cell, int | float | datetime.date):
        raise DataError(f"{where}: {shown(str(cell))}, expected text")
    name = value_name(cell)
    if name is None:
        raise DataError(f"{where}: {'a missing cell' if cell is None else repr(cell)}, expected a name")
    return name


def answer_cell(cell: Any, where: str) -> str:
    """A text, or a whole number, which becomes text.

    Raises:
        DataError: it is missing, or something else.
    """
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    return text_cell(cell, where).strip()


def listed(cell: Any, where: str, expected: str, such: str = "") -> list[Any]:
    """A list, also one written as JSON in a text cell, of which `such` is an example.

    Raises:
        DataError: it is something else.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise DataError(f"{where}: {shown(cell[:40])!r}, expected {expected}{such}") from None
    if not isinstance(cell, list):
        raise DataError(f"{where}: {type(cell).__name__}, expected {expected}")
    return cell


def list_cell(each: Callable[[Any, str], Any]) -> Callable[[Any, str], list[Any]]:
    """A list, also one written as JSON in a text cell, of what `each` reads."""

    def read(cell: Any, where: str) -> list[Any]:
        return [each(item, where) for item in listed(cell, where, "a list", " such as [1, 2]")]

    return read
