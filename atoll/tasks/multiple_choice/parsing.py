"""Finding the choice that a text written by a model means."""

from __future__ import annotations

import re
from collections.abc import Sequence

from atoll.tasks.multiple_choice.data import LETTERS

_LETTER = re.compile(r"\(?([A-Z])(?:\)\.?|[.:])?(?:\s+(.*))?", re.DOTALL)


def parsed(answer: str, choices: Sequence[str], *, by_letter: bool) -> int | None:
    """The index of the choice that an answer means; None if it means none.

    First the whole answer is compared, then its first line: with the choices' texts, ignoring case, spaces
    and a full stop; then, with `by_letter`, with the choices' letters, alone or before the choice's text.

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
    """The index of the only choice with this text, else of the only one that is equal by `_plain`."""
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
