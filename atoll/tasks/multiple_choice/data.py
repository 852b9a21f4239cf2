"""Data of multiple choice: `question`, `choices` and `answer`, in the forms of ARC, MMLU, HellaSwag, SWAG."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import pyarrow as pa

from atoll.data.columns import other_columns, role_column, values_of
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.parsers import answer_cell, optional_text_cell
from atoll.data.schema import Schema, SchemaField, chosen_name
from atoll.data.tables import Rows
from atoll.errors import DataError
from atoll.job.job import DataSection

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The letters of a question's choices, in their order."""

Reading = Literal["any", "text", "letter", "number"]
"""How an answer given as text identifies the right choice."""

_QUESTION = ("ctx", "stem", "question_stem", "startphrase", "goal", "query")
_CHOICES = ("endings", "options")
_ANSWER = ("answerkey", "label", "gold", "correct", "target")
_NUMBERED = re.compile(r"(choice|ending|option|sol)[ _]?(\d+)")


@dataclass(frozen=True)
class Choices:
    """The texts of a question's choices, and their labels, if the data has labels."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None


def choices_cell(cell: Any, where: str) -> Choices:
    """The choices in a cell: a list of texts or numbers, or texts with labels in ARC's two forms, or JSON.

    >>> choices_cell(["a", 2], "").texts
    ('a', '2')
    >>> choices_cell('{"text": ["a", "b"], "label": ["1", "2"]}', "").labels
    ('1', '2')

    Raises:
        DataError: the cell is something else, a choice is empty, or there are not 2 to 26 of them.
    """
    parsed = _parsed(cell, where)
    labels: Sequence[Any] | None = None
    if isinstance(parsed, dict) and {"text", "label"} <= parsed.keys():
        parsed, labels = parsed["text"], parsed["label"]
    elif isinstance(parsed, list) and parsed and all(isinstance(one, dict) for one in parsed):
        if not all({"text", "label"} <= one.keys() for one in parsed):
            raise DataError(f"{where}: choices of {sorted(parsed[0])}, expected text and label in each")
        parsed, labels = [one["text"] for one in parsed], [one["label"] for one in parsed]
    if not isinstance(parsed, list):
        raise DataError(f"{where}: the choices are {type(parsed).__name__}, expected a list of texts")
    return checked_choices(parsed, where, labels)


def _parsed(cell: Any, where: str) -> Any:
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        raise DataError(
            f'{where}: the choices are {shown(cell[:40])!r}, expected a list such as ["one", "two"]'
        ) from None


def checked_choices(texts: Sequence[Any], where: str, labels: Sequence[Any] | None = None) -> Choices:
    """The choices with stripped texts and labels; raises as `choices_cell`."""
    if not 2 <= len(texts) <= len(LETTERS):
        raise DataError(f"{where}: {len(texts)} choices, expected 2 to {len(LETTERS)}")
    if labels is not None and len(labels) != len(texts):
        raise DataError(f"{where}: {len(labels)} labels of {len(texts)} choices, expected one for each")
    texts_out = tuple(
        answer_cell(text, f"{where}: choice {LETTERS[place]}") for place, text in enumerate(texts)
    )
    return Choices(texts_out, None if labels is None else tuple(str(label).strip() for label in labels))


def answer_place(cell: Any, choices: Choices, reading: Reading, where: str) -> int:
    """The index of the right choice, from 0.

    A number is the index itself. A text is a label, if the choices have labels. Otherwise it is the text of a
    choice, a letter, or an index in digits, as `reading` says; with "any", a text that could mean different
    choices is refused.

    >>> answer_place("b", Choices(("one", "two")), "any", "")
    1

    Raises:
        DataError: the cell identifies no choice, or could mean several.
    """
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool):
        return _in_range(cell, choices, where)
    if not isinstance(cell, str) or not cell.strip():
        shown_cell = "nothing" if cell is None or cell == "" else shown(str(cell))
        raise DataError(f"{where}: the answer is {shown_cell}, expected a choice, its letter or its number")
    text = cell.strip()
    if choices.labels is not None:
        named = [place for place, label in enumerate(choices.labels) if label == text]
        expected = f"one of the labels {', '.join(choices.labels)}"
    else:
        named = sorted({place for way, place in _readings(text, choices) if reading in ("any", way)})
        expected = f"{_IN_WORDS[reading]} of {len(choices.texts)} choices"
    if len(named) > 1 and choices.labels is None and reading == "any":
        raise DataError(
            f"{where}: the answer {shown(text)!r} may mean choice {' or '.join(LETTERS[n] for n in named)};"
            ' expected task.options.answers = "text", "letter" or "number"'
        )
    if len(named) != 1:
        raise DataError(
            f"{where}: the answer {shown(text)!r} names {len(named)} choices, expected {expected}"
        )
    return named[0]


_IN_WORDS = {
    "any": "the text, letter or number (from 0) of one",
    "text": "the text of one",
    "letter": "the letter of one",
    "number": "the number (from 0) of one",
}


def _readings(text: str, choices: Choices) -> Iterator[tuple[Reading, int]]:
    """(the kind of reading, the choice's index) for each way in which a text can identify a choice."""
    for place, choice in enumerate(choices.texts):
        if choice == text:
            yield "text", place
    letter = LETTERS.find(text.upper()) if len(text) == 1 else -1
    if 0 <= letter < len(choices.texts):
        yield "letter", letter
    if text.isascii() and text.isdigit() and int(text) < len(choices.texts):
        yield "number", int(text)


def _in_range(place: int, choices: Choices, where: str) -> int:
    if not 0 <= place < len(choices.texts):
        raise DataError(f"{where}: the answer is number {place}, expected 0 to {len(choices.texts) - 1}")
    return place


def _texts_cell(cell: Any, where: str) -> list[str]:
    return list(choices_cell(cell, where).texts)


def _place_cell(cell: Any, where: str) -> int:
    if not isinstance(cell, int) or isinstance(cell, bool):
        raise DataError(f"{where}: the answer is {shown(str(cell))}, expected the number of a choice")
    return cell


_ROLES = (
    SchemaField("question", optional_text_cell, pa.string(), _QUESTION),
    SchemaField("choices", _texts_cell, pa.list_(pa.string()), _CHOICES),
    SchemaField("answer", _place_cell, pa.int64(), _ANSWER),
)


@dataclass(frozen=True)
class Questions(Schema):
    """A schema of questions; `answers` says how an answer given as text identifies a choice of its row."""

    answers: Reading = "any"

    def canonical(self, rows: Rows, data: DataSection, diagnostics: Diagnostics) -> pa.Table:
        if rows.is_canonical:
            return super().canonical(rows, data, diagnostics)
        rows = _flat(rows, data)
        question, answer = (str(self._column(rows, self.roles[place], data)) for place in (0, 2))
        columns = _choice_columns(rows, data)
        cells = [values_of(rows, name).to_pylist() for name in (question, answer, *columns)]
        places, rows_out = [], []
        for place, (question_cell, right, *chosen) in enumerate(zip(*cells, strict=True)):
            where = rows.where(place)
            try:
                rows_out.append(self._row(question_cell, right, chosen, len(columns) > 1, where))
            except DataError as problem:
                message = str(problem)
                diagnostics.error(problem if message.startswith(where) else DataError(f"{where}: {message}"))
                continue
            places.append(place)
        table_columns = {
            role.name: pa.chunked_array([pa.array([row[number] for row in rows_out], role.kind)])
            for number, role in enumerate(self.roles)
        }
        others = other_columns(rows, (question, answer, *columns), "", diagnostics)
        rest = {
            name: c.take(pa.array(places, pa.int64()))
            for name, c in others.items()
            if name not in table_columns
        }
        return pa.table(table_columns | rest)

    def _row(
        self, question_cell: Any, answer: Any, cells: Sequence[Any], are_columns: bool, where: str
    ) -> tuple[str, list[str], int]:
        """(question, texts of the choices, index of the right one)."""
        question = optional_text_cell(question_cell, where)
        choices = (
            checked_choices(_without_gaps(cells, where), where)
            if are_columns
            else choices_cell(cells[0], where)
        )
        place = answer_place(answer, choices, self.answers, where)
        right = choices.texts[place]
        if choices.texts.count(right) > 1:
            raise DataError(f"{where}: the right choice {shown(right)!r} is there twice, expected once")
        return question, list(choices.texts), place


def _without_gaps(cells: Sequence[Any], where: str) -> list[Any]:
    """A row's choices from one column each; cells after the last choice may be empty."""
    filled = [cell for cell in cells if cell not in (None, "")]
    if list(cells[: len(filled)]) != filled:
        gap = next(place for place, cell in enumerate(cells) if cell in (None, ""))
        raise DataError(f"{where}: choice {LETTERS[gap]} is empty and a later one isn't, expected some text")
    return filled


def _flat(rows: Rows, data: DataSection) -> Rows:
    """The rows of ARC's JSON Lines with the nested stem and choices of a question as columns."""
    name = chosen_name(data, "question") or "question"
    if name not in rows.table.column_names:
        return rows
    kind = rows.table.schema.field(name).type
    if not pa.types.is_struct(kind) or not {"stem", "choices"} <= {field.name for field in kind}:
        return rows
    held = values_of(rows, name).to_pylist()
    table = rows.table
    for part in ("choices", "stem"):
        inner = kind.field(part).type
        values = [None if one is None else one[part] for one in held]
        at = name if part == "stem" else part
        column = pa.chunked_array([pa.array(values, inner)])
        if at in table.column_names:
            table = table.set_column(table.column_names.index(at), at, column)
        else:
            table = table.append_column(at, column)
    return Rows(rows.name, table, rows.where, rows.folder, rows.class_names)


def _choice_columns(rows: Rows, data: DataSection) -> list[str]:
    """The name of the column with all choices, or the names of the columns with one choice each.

    Raises:
        DataError: there is no such column.
    """
    chosen, names = chosen_name(data, "choices"), rows.table.column_names
    if chosen is not None and chosen not in names and "," in chosen:
        return [
            str(role_column(rows, "choices", part.strip(), ())) for part in chosen.split(",") if part.strip()
        ]
    column = role_column(rows, "choices", chosen, ("choices", *_CHOICES), required=False)
    if column is not None:
        return [column]
    apart = _numbered(names) or _lettered(names)
    if not apart:
        raise DataError(
            f"{rows.name}: columns {names}, expected choices (a list), or a column for each (choice0, …;"
            ' ending0, …; option1, …; A, B, …), or their names as data.columns.choices = "one, two"'
        )
    return apart


def _numbered(names: Sequence[str]) -> list[str]:
    """The columns ending0, ending1, … or alike, in the order of their numbers; empty if one is missing."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name.strip().lower()):
            groups.setdefault(match[1], {})[int(match[2])] = name
    for numbered in groups.values():
        first = min(numbered)
        if len(numbered) > 1 and sorted(numbered) == list(range(first, first + len(numbered))):
            return [numbered[number] for number in sorted(numbered)]
    return []


def _lettered(names: Sequence[str]) -> list[str]:
    """The columns A, B, … up to the first missing letter; empty if there are fewer than two."""
    known = {name.strip().upper(): name for name in names}
    most = next(place for place in count() if place == len(LETTERS) or LETTERS[place] not in known)
    return [known[letter] for letter in LETTERS[:most]] if most > 1 else []


QUESTIONS = Questions(_ROLES)
