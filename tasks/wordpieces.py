"""A tokenizer that needs no file: words that generated texts use, and characters for all others."""

from __future__ import annotations

import string
from functools import lru_cache
from typing import Any

PAD, END, UNKNOWN = 0, 1, 2
_SPECIAL = ("<pad>", "</s>", "<unk>")
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
NUMBERS = 101


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """Pieces and their numbers, the same everywhere: special ones, characters, numbers, words."""
    from tasks.generated.commands import command_words
    from tasks.generated.questions import question_words

    numbers = map(str, range(NUMBERS))
    inner = (f"##{character}" for character in _CHARACTERS)
    words = sorted({*question_words(), *command_words()})
    pieces = dict.fromkeys((*_SPECIAL, *_CHARACTERS, *inner, *numbers, *words))
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
