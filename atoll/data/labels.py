"""How a value becomes a name (of a class, an item, a client): by a fixed rule, so that sites agree apart.

A value has one name in every format: a boolean of Parquet is the `True` that pandas writes into a CSV file,
and a whole number is the same as an integer, as a float and as text.
"""

import datetime
import math
import re
import unicodedata
from collections.abc import Sequence

from atoll.data.diagnostics import shown
from atoll.errors import DataError

MAX_LABEL_LENGTH = 200
_MISSING = {"", "nan", "null", "<na>"}
_WHOLE = re.compile(r"([-+]?)0*(\d+)\.0+")
_TRUTHS = {text: text.lower() for text in ("True", "TRUE", "False", "FALSE")}
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?([+-]\d\d:?\d\d|Z)?")
_NUMBER = re.compile(r"[-+]?(\d+[.,]\d*|[.,]\d+|\d+(?=e))(e[-+]?\d+)?|[-+]?inf(inity)?", re.IGNORECASE)


def value_name(value: object) -> str | None:
    """The one text for a value, whatever format it was read from; None where it is missing.

    Text is stripped and brought to Unicode's NFC. Truth values, whole numbers and dates are named alike
    whether they are values or text.

    >>> value_name(True), value_name("True"), value_name(7.0), value_name(" 7.00"), value_name("nan")
    ('true', 'true', '7', '7', None)
    >>> value_name(datetime.date(2024, 3, 1)), value_name("2024-03-01 00:00:00")
    ('2024-03-01', '2024-03-01')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return _moment_name(value)
    name = unicodedata.normalize("NFC", str(value).strip())
    if name.lower() in _MISSING:
        return None
    if whole := _WHOLE.fullmatch(name):
        return str(int(whole[1] + whole[2]))
    if _MOMENT.fullmatch(name):
        try:
            return _moment_name(datetime.datetime.fromisoformat(name))
        except ValueError:
            return name
    return _TRUTHS.get(name, name)


def _moment_name(moment: datetime.datetime) -> str:
    """In ISO 8601; pandas writes days as midnights."""
    is_day = moment.time() == datetime.time() and moment.tzinfo is None
    return moment.date().isoformat() if is_day else moment.isoformat()


def class_name(value: object, where: str, names: Sequence[str] | None = None) -> str:
    """The class that `value` names.

    Text is stripped and brought to Unicode's NFC; whole numbers, also written 1.0, become "1".
    With `names`, a whole number is an index into them. A missing label, a fraction, or anything else
    raises `DataError`.

    >>> class_name(" sport ", "a.csv line 2"), class_name(1, ""), class_name("1.0", ""), class_name(True, "")
    ('sport', '1', '1', 'true')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: the label is missing, expected a class")
    if names is not None and isinstance(value, int):
        value = _at(value, names, where)
    if isinstance(value, float) and not value.is_integer():
        raise DataError(f"{where}: the label is {value}, expected a class, which no fraction can be")
    if not isinstance(value, str | int | float | datetime.date):
        raise DataError(f"{where}: the label is {shown(str(value))}, expected text, a whole number or a date")
    return _checked_name(value, where)


def _at(index: int, names: Sequence[str], where: str) -> str:
    if not 0 <= index < len(names):
        raise DataError(f"{where}: the label is class index {index}, expected 0 to {len(names) - 1}")
    return names[index]


def _checked_name(value: object, where: str) -> str:
    name = value_name(value)
    if name is None:
        raise DataError(f"{where}: the label is {str(value).strip()!r}, which is missing; expected a class")
    if len(name) > MAX_LABEL_LENGTH:
        raise DataError(f"{where}: the label has {len(name)} characters, at most {MAX_LABEL_LENGTH} allowed")
    if not name.isprintable():
        raise DataError(f"{where}: the label is {shown(name)}, expected printable text")
    if _NUMBER.fullmatch(name):
        raise DataError(f"{where}: the label is {name!r}, expected a class, which no fraction can be")
    return name


def alike(spellings: Sequence[Sequence[str]]) -> list[str]:
    """Classes of several lists that a person would read as one, written out.

    >>> alike([["Sport", "news"], ["sport", "fine  art"], ["fine art"]])
    ["'Sport', 'sport'", "'fine  art', 'fine art'"]
    """
    groups: dict[str, list[str]] = {}
    for name in sorted({name for names in spellings for name in names}):
        groups.setdefault("".join(name.split()).casefold(), []).append(name)
    return [", ".join(map(repr, names)) for names in groups.values() if len(names) > 1]
