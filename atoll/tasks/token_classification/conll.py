"""Reading CoNLL files: one word per line with its tag in the last column, empty lines between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from atoll.data.diagnostics import Diagnostics, shown
from atoll.data.folders import checked_file
from atoll.data.tables import Rows, joined, text_lines
from atoll.errors import DataError

SUFFIXES = (".conll", ".conll2003", ".bio", ".iob", ".iob2", ".bioes", ".ner", ".txt")
DOCUMENT = "-DOCSTART-"
"""The first word of a CoNLL-2003 line that begins a document; such a line is no word."""

_SPLITS = {"test": "test", "testa": "validation", "testb": "test", "train": "train"}
_SPLIT_NAME = re.compile(r"(?:.*[._-])?(train|test|testa|testb|dev|valid|validation|val)")


def open_conll(path: Path, diagnostics: Diagnostics) -> dict[str, Rows] | None:
    """The sentences in a CoNLL file, or in a folder of such files, by split; None if there is no such file.

    A folder has a single file, or several whose names contain a split: `train.conll`, `eng.testa.txt`.

    Raises:
        DataError: there are several files, and one's name contains no split.
    """
    if path.is_file():
        return {"train": _sentences(path, diagnostics)} if path.suffix.lower() in SUFFIXES else None
    files = [file for file in sorted(path.iterdir()) if _is_conll(file)] if path.is_dir() else []
    if len(files) < 2:
        return {"train": _sentences(checked_file(files[0], path), diagnostics)} if files else None
    splits: dict[str, list[Rows]] = {}
    for file in files:
        named = _SPLIT_NAME.fullmatch(file.stem.lower())
        if named is None:
            raise DataError(
                f"{shown(file)}: its name is of no part of the data, expected one file, or train and test"
            )
        split = _SPLITS.get(named[1], "validation")
        splits.setdefault(split, []).append(_sentences(checked_file(file, path), diagnostics))
    return {split: replace(joined(parts), is_canonical=True) for split, parts in splits.items()}


def _is_conll(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


@dataclass
class _Sentence:
    """The words and tags of a sentence, and the number of its first line."""

    line: int
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def _sentences(path: Path, diagnostics: Diagnostics) -> Rows:
    sentences = [one for one in _read(path, diagnostics) if one.words]
    kind = pa.list_(pa.string())
    columns = {
        "tokens": pa.array([one.words for one in sentences], kind),
        "tags": pa.array([one.tags for one in sentences], kind),
    }

    def where(row: int) -> str:
        return f"{shown(path)} line {sentences[row].line}"

    return Rows(shown(path), pa.table(columns), where, path.parent, is_canonical=True)


def _read(path: Path, diagnostics: Diagnostics) -> Iterator[_Sentence]:
    """The sentences of a file; one with an invalid line is left out, and the line is reported."""
    sentence, width, is_bad = _Sentence(1), 0, False
    for number, line in enumerate(text_lines(path, diagnostics), start=1):
        parts = _columns(line)
        if not parts or parts[0] == DOCUMENT:
            if not is_bad:
                yield sentence
            sentence, is_bad = _Sentence(number + 1), False
            continue
        if parts[0].startswith("#") and len(parts) != (width or 0):
            continue  # a comment: a word "#" has as many columns as the other words
        width = width or len(parts)
        problem = _problem(parts, width)
        if problem:
            diagnostics.error(DataError(f"{shown(path)} line {number}: {problem}"))
        is_bad = is_bad or bool(problem)
        sentence.words.append(parts[0])
        sentence.tags.append(parts[-1])
    if not is_bad:
        yield sentence


def _columns(line: str) -> Sequence[str]:
    """The columns of a line, separated by tabs if it has any, else by spaces."""
    if not line.strip():
        return ()
    return [part.strip() for part in line.strip("\r\n").split("\t")] if "\t" in line else line.split()


def _problem(parts: Sequence[str], width: int) -> str:
    if len(parts) < 2:
        return "one column, expected a word and its tag"
    if len(parts) != width:
        return f"{len(parts)} columns, expected {width} as in the lines before"
    return "" if parts[0] and parts[-1] else "an empty column, expected a word and its tag"
