"""A tokenizer that needs no file: it knows a list of words, and writes all others in characters."""

from __future__ import annotations

import string
from functools import lru_cache
from typing import Any

PAD, END, UNKNOWN = 0, 1, 2
_SPECIAL = ("<pad>", "</s>", "<unk>")
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
NUMBERS = 101

_TEXT = """
    Anna Ben Carla David Emma Felix Grace Hugo Ida Jonas Kira Leo The a again airport an and anna apples
    at attic aunt ball bathroom bedroom ben berlin black blue boat books bowl box brown call car cards
    chair classical coat coins cold colour context could count cups dark degrees dining doctor door down
    drive eighteen emma five folk for forest forty francisco garage garden green grey guest half hall
    harbour has hat have hear heat hello hey hip hop hour hours how i in is it jazz joe keys kitchen
    lamp library light lights living london madrid make many market me minus minutes more mother music
    my new news nineteen now off office okay old on one oslo pens phone piano play please plums plus
    question quickly rain red ring rock room rose san seconds set shells show sixteen songs stamps
    station take ten thanks the thirty three timer to today tonight town turn twenty two uncle up wake
    want way weather what where white who will would yellow york you
"""

WORDS = tuple(_TEXT.split())
"""In order, for a network's rows go by a word's place: this list stays, and another one may be made."""


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Pieces and their numbers, the same everywhere: special ones, characters, numbers, words."""
    numbers = map(str, range(NUMBERS))
    inner = (f"##{character}" for character in _CHARACTERS)
    pieces = dict.fromkeys((*_SPECIAL, *_CHARACTERS, *inner, *numbers, *WORDS))
    return {piece: number for number, piece in enumerate(pieces)}


def own_tokenizer() -> Any:
    """A tokenizer of transformers' over `vocabulary`; a text ends with `</s>`.

    What it reads it writes again, but for spaces and for letters outside ASCII.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, end, unknown = _SPECIAL
    pieces = Tokenizer(models.WordPiece(vocabulary(), unk_token=unknown, max_input_chars_per_word=100))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    pieces.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, END)]
    )
    made: Any = PreTrainedTokenizerFast
    return made(
        tokenizer_object=pieces, pad_token=pad, eos_token=end, unk_token=unknown, padding_side="right"
    )
