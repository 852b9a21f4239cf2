"""The symbols that a recogniser writes with, and what it hears as text (CTC, Graves et al. 2006)."""

from __future__ import annotations

import json
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atoll.backbones.resolve import Backbone, is_run_checkpoint, local_folder
from atoll.backbones.whisper import WHISPER
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection

_DROPPED = str.maketrans("", "", string.punctuation.replace("'", ""))


def normalize_transcript(text: str) -> str:
    """A transcript as it is compared: lower case, without punctuation but for apostrophes, single spaces.

    Of any script, in Unicode's NFC.

    >>> normalize_transcript("Turn  on the light, please!"), normalize_transcript("¿Qué «tal»…?")
    ('turn on the light please', 'qué tal')
    """
    plain = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'").translate(_DROPPED)
    letters = (c for c in plain if c == "'" or not unicodedata.category(c).startswith("P"))
    return " ".join("".join(letters).split())


@dataclass(frozen=True)
class CtcVocabulary:
    """Numbers of letters; the blank is no letter."""

    numbers: Mapping[str, int]
    blank: int
    size: int

    def coded(self, text: str) -> list[int]:
        """The numbers of a text's letters; one that there isn't is left out."""
        return [self.numbers[letter] for letter in text if letter in self.numbers]

    def unwritten(self, texts: Sequence[str]) -> str:
        """One line on the letters of normalised texts that there aren't; nothing where there are all.

        >>> ENGLISH_LETTERS.unwritten(["call 112", "größe", "yes"])
        "2 of 3 transcripts hold letters that can't be written and aren't learnt: '12ßö'"
        """
        lost = [set(text) - self.numbers.keys() for text in texts]
        if not any(lost):
            return ""
        letters = sorted(set().union(*lost))
        more = f" and {len(letters) - SHOWN} more" if len(letters) > SHOWN else ""
        return (
            f"{sum(map(bool, lost))} of {len(texts)} transcripts hold letters that can't be written and"
            f" aren't learnt: {''.join(letters[:SHOWN])!r}{more}"
        )

    def texts(self, outputs: torch.Tensor) -> list[str]:
        """What is heard in scores [batch, frames, symbols]: the best of each frame, repeats merged."""
        written = {number: letter for letter, number in self.numbers.items()}
        heard = [torch.unique_consecutive(row).tolist() for row in outputs.argmax(2).cpu()]
        return [" ".join("".join(written.get(n, "") for n in row).split()) for row in heard]


def vocabulary_of(letters: str) -> CtcVocabulary:
    """A fresh layer's, of those letters and the space: as transcripts are compared, in order of their code.

    >>> sorted(vocabulary_of("Größe 12").numbers)
    [' ', '1', '2', 'e', 'g', 'r', 'ß', 'ö']
    """
    return _numbered(sorted({" ", *normalize_transcript(letters)}))


def _numbered(letters: Sequence[str]) -> CtcVocabulary:
    return CtcVocabulary({letter: number for number, letter in enumerate(letters, 1)}, 0, len(letters) + 1)


ENGLISH_LETTERS = _numbered(f"' {string.ascii_lowercase}")
SHOWN = 40
"""Letters that a line names."""
SMALL_CTC = "small-ctc"
"""Atoll's own network that writes letters."""


def english_and(others: Iterable[str]) -> CtcVocabulary:
    """The English letters, and behind them the others in order of their code.

    >>> english_and("") == ENGLISH_LETTERS, [*english_and("öße").numbers][-3:]
    (True, ['z', 'ß', 'ö'])
    """
    return _numbered([*ENGLISH_LETTERS.numbers, *sorted(set(others) - ENGLISH_LETTERS.numbers.keys())])


def has_letters(section: BackboneSection) -> bool:
    """Whether a job's network brings its letters, so that those of the data are not needed.

    Nothing is downloaded for it: a network that isn't on this machine yet is taken to bring them.
    """
    if section.weights not in ("pretrained", "random"):
        path = Path(section.weights)
        if section.name == f"atoll:{SMALL_CTC}" and path.is_file():
            return True
        if _letters_of_run(path / "model" / "model.safetensors") is not None:
            return True
    if section.name.startswith("hf:") or ":" not in section.name:
        folder = local_folder(section)
        return folder is None or _has_table(folder)
    return False


def letters_of(
    backbone: Backbone, letters: str | None = None, letters_of_data: Iterable[str] = ()
) -> CtcVocabulary:
    """Those of a network's folder (`vocab.json`); else `letters`, or those of the run that weights are from.

    Where there are none of these: the English ones and `letters_of_data`. A folder of Whisper's has the
    pieces of words that its decoder writes, and so no letters.

    Raises:
        WeightsError: the file isn't a table of letters, or is missing beside a layer of letters.
        ConfigError: letters are given, and the folder has its own.
    """
    path = Path(backbone.folder or "") / "vocab.json"
    if backbone.kind != "hf" or not _has_table(path.parent):
        _check_no_letters(backbone)
        if letters is not None:
            return vocabulary_of(letters)
        of_run = None if backbone.weights is None else _letters_of_run(backbone.weights)
        is_file = backbone.kind == "atoll" and backbone.weights is not None
        return of_run or (ENGLISH_LETTERS if is_file else english_and(letters_of_data))
    try:
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
        if letters is not None:
            raise ConfigError(f"task.options.letters: {path} says the letters of this network, expected none")
        table: dict[str, Any] = json.loads(path.read_text("utf-8"))
        numbers = {_letter(symbol): int(number) for symbol, number in table.items() if _is_letter(symbol)}
    except (ValueError, TypeError, AttributeError):
        raise WeightsError(f"{path}: expected a table of letters and their numbers") from None
    if " " not in numbers:
        raise WeightsError(f"{path}: no symbol for a space, expected '|' or ' '")
    size = max(len(table), int(config.get("vocab_size") or 0))
    return CtcVocabulary(numbers, int(config.get("pad_token_id") or 0), size)


def _has_table(folder: Path) -> bool:
    """Whether a folder has a table of letters: Whisper's table is of pieces of words."""
    config = folder / "config.json"
    if not (folder / "vocab.json").is_file() or not config.is_file():
        return False
    try:
        return bool(json.loads(config.read_text("utf-8")).get("model_type") != WHISPER)
    except (ValueError, AttributeError):
        return True  # `letters_of` says what is wrong with it


def _letters_of_run(weights: Path) -> CtcVocabulary | None:
    """The letters of the run whose model a file is; None where it is no model of a recogniser's run.

    Raises:
        WeightsError: what the run says of its model can't be read.
    """
    if not is_run_checkpoint(weights):
        return None
    about = weights.parent / "model.json"
    try:
        saved = json.loads(about.read_text("utf-8"))
        task = saved["job"]["task"]
        if task["name"] != "speech-recognition":
            return None
        letters = task["options"].get("letters")
        return english_and(saved["facts"].get("letters", ())) if letters is None else vocabulary_of(letters)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise WeightsError(f"{about}: damaged, expected the job of the run and its facts") from None


def _check_no_letters(backbone: Backbone) -> None:
    """Raises WeightsError where a folder's weights have a layer of letters that nothing names."""
    weights, config = backbone.weights, Path(backbone.folder or "") / "config.json"
    if backbone.kind != "hf" or weights is None or not weights.is_dir() or not config.is_file():
        return
    kinds = json.loads(config.read_text("utf-8")).get("architectures") or [""]
    if str(kinds[0]).endswith("ForCTC"):
        raise WeightsError(
            f"{config.parent}: {kinds[0]} without vocab.json, the table of its letters; expected that file,"
            " which save_pretrained of its processor writes"
        )


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
