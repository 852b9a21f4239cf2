"""The symbols that a recogniser writes with, and what it hears as text (CTC, Graves et al. 2006)."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atoll.backbones.resolve import Backbone
from atoll.backbones.whisper import WHISPER
from atoll.errors import WeightsError

_DROPPED = str.maketrans("", "", string.punctuation.replace("'", ""))


def normalize_transcript(text: str) -> str:
    """A transcript as it is compared: lower case, without punctuation but for apostrophes, single spaces.

    >>> normalize_transcript("Turn  on the light, please!")
    'turn on the light please'
    """
    return " ".join(text.lower().translate(_DROPPED).split())


@dataclass(frozen=True)
class CtcVocabulary:
    """Numbers of letters; the blank is no letter."""

    numbers: Mapping[str, int]
    blank: int
    size: int

    def coded(self, text: str) -> list[int]:
        """The numbers of a text's letters; one that there isn't is left out."""
        return [self.numbers[letter] for letter in text if letter in self.numbers]

    def texts(self, outputs: torch.Tensor) -> list[str]:
        """What is heard in scores [batch, frames, symbols]: the best of each frame, repeats merged."""
        written = {number: letter for letter, number in self.numbers.items()}
        heard = [torch.unique_consecutive(row).tolist() for row in outputs.argmax(2).cpu()]
        return [" ".join("".join(written.get(n, "") for n in row).split()) for row in heard]


def _own() -> CtcVocabulary:
    letters = f"' {string.ascii_lowercase}"
    return CtcVocabulary({letter: number for number, letter in enumerate(letters, 1)}, 0, len(letters) + 1)


ENGLISH_LETTERS = _own()


def letters_of(backbone: Backbone) -> CtcVocabulary:
    """Those of a network's folder (`vocab.json`), or our own where it has none.

    That of Whisper is of its decoder's pieces of words, so it has none.

    Raises:
        WeightsError: the file isn't a table of letters.
    """
    path = Path(backbone.folder or "") / "vocab.json"
    if backbone.kind != "hf" or not path.is_file():
        return ENGLISH_LETTERS
    try:
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
        if config.get("model_type") == WHISPER:
            return ENGLISH_LETTERS
        table: dict[str, Any] = json.loads(path.read_text("utf-8"))
        numbers = {_letter(symbol): int(number) for symbol, number in table.items() if _is_letter(symbol)}
    except (ValueError, TypeError, AttributeError):
        raise WeightsError(f"{path}: expected a table of letters and their numbers") from None
    if " " not in numbers:
        raise WeightsError(f"{path}: no symbol for a space, expected '|' or ' '")
    size = max(len(table), int(config.get("vocab_size") or 0))
    return CtcVocabulary(numbers, int(config.get("pad_token_id") or 0), size)


def _is_letter(symbol: str) -> bool:
    return len(symbol) == 1


def _letter(symbol: str) -> str:
    return " " if symbol == "|" else symbol.lower()


def code_points(texts: Sequence[str], nothing: int) -> torch.Tensor:
    """Texts as rows of Unicode code points, [n, longest], filled up with `nothing`."""
    table = torch.full((len(texts), max(map(len, texts), default=0)), nothing)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = torch.tensor([ord(letter) for letter in text])
    return table


def from_code_points(table: torch.Tensor) -> list[str]:
    """What `code_points` was given."""
    return ["".join(chr(point) for point in row if point >= 0) for row in table.tolist()]
