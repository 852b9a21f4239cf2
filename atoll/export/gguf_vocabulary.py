"""A tokenizer as GGUF has it: tokens, merges, and by name how a text is split before it is merged.

The names are llama.cpp's, which holds for each a pattern of its own; a tokenizer that splits in another way
has no name, and a file with a wrong one would be read without an error into other tokens.
"""

from __future__ import annotations

import json
from typing import Any

from atoll.errors import ConfigError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pattern, by which its tokenizer is known."""
NORMAL, SPECIAL, ADDED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens: ordinary, special, added to a text's vocabulary, and rows that no token has."""


def check_vocabulary(tokenizer: Any) -> None:
    """Raises ConfigError unless GGUF has a name for what the tokenizer does."""
    parts = _parts(tokenizer)
    model, why = parts["model"], None
    marks = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model.get("byte_fallback") or marks:
        why = f"of kind {model['type']}, expected pairs of bytes (BPE) without marks"
    elif parts["normalizer"] is not None:
        why = "one that changes texts first, expected none of that"
    elif split_name(parts["pre_tokenizer"]) is None:
        why = "one that splits texts in a way of its own, expected GPT-2's, SmolLM's or Llama 3's"
    elif model.get("ignore_merges", False) != (split_name(parts["pre_tokenizer"]) == "llama-bpe"):
        why = "one that merges in another way than others that split as it does, expected theirs"
    elif _ends(tokenizer) is None:
        why = "one that puts other tokens around a text, expected what begins it, what ends it, or neither"
    if why is not None:
        raise ConfigError(f"--format gguf: the tokenizer is {why}; try huggingface")


def _parts(tokenizer: Any) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return parts


def split_name(splits: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for a way of splitting, as tokenizers writes it; None for one that isn't known.

    >>> split_name({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True})
    'gpt-2'
    """
    steps = [] if splits is None else splits.get("pretokenizers", [splits])
    kinds = [step["type"] for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2" if steps[0]["use_regex"] else None
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds != ["Split", "ByteLevel"] or steps[1]["use_regex"]:
        return None
    is_llama3 = steps[0]["pattern"] == {"Regex": LLAMA3} and steps[0]["behavior"] == "Isolated"
    return "llama-bpe" if is_llama3 and not steps[0]["invert"] else None


def _ends(tokenizer: Any) -> tuple[bool, bool] | None:
    """Whether a text gets what begins it, and what ends it; None where it gets anything else."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return begins, ends
    return None


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """All tokens up to the network's `size`, how texts become them, what is special, and the template.

    Raises:
        ConfigError: the tokenizer has more tokens than the network.
    """
    parts, ends = _parts(tokenizer), _ends(tokenizer)
    if (last := max(tokenizer.get_vocab().values())) >= size:
        raise ConfigError(f"--format gguf: a token {last}, expected {size - 1} at most, as the network has")
    assert ends is not None, "it was looked at before"
    tokens, kinds = _tokens(tokenizer, parts, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(parts["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = parts["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(ends[0])
    writer.add_add_eos_token(ends[1])
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.get_chat_template())


def _tokens(tokenizer: Any, parts: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(every token in the order of ids, its kind)."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = token, NORMAL
    for added in parts["added_tokens"]:
        kinds[added["id"]] = SPECIAL if added["special"] else ADDED
    return tokens, kinds
