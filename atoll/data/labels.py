"""How a label becomes a class name: by one fixed rule, so that sites agree without meeting."""

import math
import re
import unicodedata
from collections.abc import Sequence

from atoll.data.diagnostics import shown
from atoll.errors import DataError

MAX_LABEL_LENGTH = 200
_MISSING = {"", "nan", "null", "<na>"}
_WHOLE = re.compile(r"([-+]?)0*(\d+)\.0+")
_NUMBER = re.compile(r"[-+]?(\d+[.,]\d*|[.,]\d+|\d+(?=e))(e[-+]?\d+)?|[-+]?inf(inity)?", re.IGNORECASE)


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
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number_name(value, where)
    if isinstance(value, str):
        return _text_name(value, where)
    raise DataError(f"{where}: the label is {shown(str(value))}, expected text or a whole number")


def _at(index: int, names: Sequence[str], where: str) -> str:
    if not 0 <= index < len(names):
        raise DataError(f"{where}: the label is class index {index}, expected 0 to {len(names) - 1}")
    return names[index]


def _number_name(value: int | float, where: str) -> str:
    if isinstance(value, float) and not value.is_integer():
        raise DataError(f"{where}: the label is {value}, expected a class, which no fraction can be")
    return str(int(value))


def _text_name(value: str, where: str) -> str:
    name = unicodedata.normalize("NFC", value.strip())
    if name.lower() in _MISSING:
        raise DataError(f"{where}: the label is {name!r}, which is missing; expected a class")
    if len(name) > MAX_LABEL_LENGTH:
        raise DataError(f"{where}: the label has {len(name)} characters, at most {MAX_LABEL_LENGTH} allowed")
    if not name.isprintable():
        raise DataError(f"{where}: the label is {shown(name)}, expected printable text")
    if whole := _WHOLE.fullmatch(name):
        return str(int(whole[1] + whole[2]))
    if _NUMBER.fullmatch(name):
        raise DataError(f"{where}: the label is {name!r}, expected a class, which no fraction can be")
    return name
