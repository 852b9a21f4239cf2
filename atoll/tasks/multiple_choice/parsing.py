"""Which choice a text that a model wrote stands for, if for any."""

from __future__ import annotations

import re
from collections.abc import Sequence

from atoll.tasks.multiple_choice.data import LETTERS

_LETTER = re.compile(r"\(?([A-Z])(?:\)\.?|[.:])?(?:\s+(.*))?", re.DOTALL)


def parsed(answer: str, choices: Sequence[str], *, by_letter: bool) -> int | None:
    """The place of the choice that is said, or None.

    What counts is the whole text, else its first line: as a choice's text, whatever its case, blanks and full
    stop; or, `by_letter`, as a choice's letter, alone or before its text. A text comes before a letter.

    >>> choices = ["Paris", "The Hague", "B"]
    >>> [parsed(said, choices, by_letter=True) for said in ("paris.", "B", "(A)", "B. The Hague", "B. Paris")]
    [0, 2, 0, 1, None]
    """
    for text in (answer, answer.strip().partition("\n")[0]):
        for place in (_by_text(text, choices), _by_letter(text, choices) if by_letter else None):
            if place is not None:
                return place
    return None


def _by_text(answer: str, choices: Sequence[str]) -> int | None:
    """The only choice with this very text, else the only one with this text but for case and full stop."""
    for form in (str.strip, _plain):
        places = [place for place, choice in enumerate(choices) if form(choice) == form(answer)]
        if len(places) == 1:
            return places[0]
    return None


def _by_letter(answer: str, choices: Sequence[str]) -> int | None:
    match = _LETTER.fullmatch(answer.strip())
    place = -1 if match is None else LETTERS.index(match[1])
    if match is None or place >= len(choices):
        return None
    rest = (match[2] or "").strip()
    return place if not rest or _plain(rest) == _plain(choices[place]) else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
