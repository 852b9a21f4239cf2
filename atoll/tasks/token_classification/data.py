"""Data of token classification: sentences as lists of words, with a tag for each word."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from atoll.data.columns import role_column
from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.parsers import name_cell
from atoll.data.schema import Schema, SchemaField, chosen_name
from atoll.data.tables import SUFFIXES, Rows
from atoll.data.texts import MAX_TEXT_BYTES
from atoll.errors import DataError
from atoll.job.job import DataSection
from atoll.tasks.token_classification.conll import SUFFIXES as CONLL_SUFFIXES
from atoll.tasks.token_classification.conll import open_conll
from atoll.tasks.token_classification.metrics import MARKS, OUTSIDE

WORDS_EXPECTED = "a list of words, or words with spaces between them"


def words_cell(cell: Any, where: str) -> list[str]:
    """The words of a sentence; the cell is a list, JSON text of a list, or words separated by spaces.

    >>> words_cell("Anna lives here", ""), words_cell('["New York", "calls"]', "")
    (['Anna', 'lives', 'here'], ['New York', 'calls'])

    Raises:
        DataError: the cell is something else, is too long, or has no word or an empty one.
    """
    words = _listed(cell)
    if words is None or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: {_described(cell)}, expected {WORDS_EXPECTED}")
    for word in words:
        if not word.strip() or "\0" in word:
            raise DataError(f"{where}: the word {shown(repr(word))}, expected text in each word")
    if not words:
        raise DataError(f"{where}: no word, expected one at least")
    if (size := sum(len(word.encode()) for word in words)) > MAX_TEXT_BYTES:
        raise DataError(f"{where}: {size} bytes of text, at most {MAX_TEXT_BYTES} allowed")
    return words


def tags_cell(cell: Any, where: str, names: Sequence[str] = ()) -> list[str]:
    """The tags of a sentence, in the same forms as its words; each is O, a name, or such as B-name.

    Integers are indices into `names`.

    >>> tags_cell("B-city O", ""), tags_cell([1, 0], "", ["O", "city"])
    (['B-city', 'O'], ['city', 'O'])

    Raises:
        DataError: the cell is something else, or a tag is invalid.
    """
    tags = _listed(cell)
    if tags is None:
        raise DataError(f"{where}: {_described(cell)}, expected a list of tags, or tags with spaces between")
    return [_tag(tag, where, names) for tag in tags]


def _tag(tag: Any, where: str, names: Sequence[str]) -> str:
    if isinstance(tag, int) and not isinstance(tag, bool):
        if not 0 <= tag < len(names):
            known = f"0 to {len(names) - 1}" if names else "names of tags, or data.classes in their order"
            raise DataError(f"{where}: tag {tag}, expected {known}")
        return names[tag]
    name = name_cell(tag, f"{where}: a tag")
    mark, dash, rest = name.partition("-")
    if name != OUTSIDE and dash and (not rest or (len(mark) == 1 and mark not in MARKS)):
        raise DataError(
            f"{where}: tag {shown(repr(name))}, expected O, or a name behind B-, I-, E-, S- or alone"
        )
    return name


def _listed(cell: Any) -> list[Any] | None:
    """The parts of a cell as a list; None if it is neither a list nor text."""
    if isinstance(cell, list):
        return cell
    if not isinstance(cell, str):
        return None
    if cell.lstrip().startswith("["):
        try:
            listed = json.loads(cell)
        except ValueError:
            return cell.split()
        if isinstance(listed, list):
            return listed
    return cell.split()


def _described(cell: Any) -> str:
    if cell is None:
        return "nothing"
    return f"a list with {shown(repr(cell)[:40])}" if isinstance(cell, list) else type(cell).__name__


def _one_each(parts: Mapping[str, Any], where: str) -> None:
    words, tags = parts["tokens"], parts["tags"]
    if len(words) != len(tags):
        raise DataError(f"{where}: {len(tags)} tags for {len(words)} words, expected one a word")


_LIST = pa.list_(pa.string())
_TOKENS = SchemaField("tokens", words_cell, _LIST, ("words", "text", "sentence"))
_TAGS = SchemaField("tags", tags_cell, _LIST, ("ner_tags", "labels", "pos_tags", "entities"))


@dataclass(frozen=True)
class Sentences(Schema):
    """A schema of words with tags; tags may be numbers if the data or the job names the classes."""

    def canonical(self, rows: Rows, data: DataSection, diagnostics: Diagnostics) -> pa.Table:
        chosen, usual = chosen_name(data, "tags"), (_TAGS.name, *_TAGS.usual)
        name = None if rows.is_canonical else role_column(rows, "tags", chosen, usual)
        names = rows.class_names.get(name or "", data.classes or ())
        read = replace(_TAGS, read=partial(tags_cell, names=tuple(names)))
        return Schema((_TOKENS, read), check_row=_one_each).canonical(rows, data, diagnostics)


SENTENCES = Sentences(
    (_TOKENS, _TAGS),
    open_layout=open_conll,
    layout=f"CoNLL files ({', '.join(CONLL_SUFFIXES)}), or one file of {', '.join(SUFFIXES)}",
    check_row=_one_each,
)
