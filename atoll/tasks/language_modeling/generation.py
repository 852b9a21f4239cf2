"""Text generation with a causal network: greedy, or by sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atoll.errors import ConfigError
from atoll.protocol.random_streams import global_stream

if TYPE_CHECKING:
    from transformers import GenerationConfig

_UNFINISHED = "\ufffd"
"""The character that a decoder writes for an incomplete multi-byte character."""


@dataclass(frozen=True)
class Decoding:
    """How a text is generated: at most `max_new_tokens` tokens; greedily if `temperature` is 0.

    With a higher temperature, tokens are sampled from the fewest most likely ones whose probabilities sum to
    `top_p` (nucleus sampling).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of its range, or `top_p` is set at temperature 0."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {self.max_new_tokens}, expected at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature: {self.temperature}, expected 0 or a number above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p}, expected a number above 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(
                f"top_p: {self.top_p}, but at temperature 0 nothing is drawn; expected a temperature above 0"
            )


def written_on(
    network: nn.Module,
    tokenizer: Any,
    prompt: torch.Tensor,
    how: Decoding,
    seed: int,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that the network generates after a prompt [tokens], stripped; the same for the same seed.

    `on_text` is called with each piece of the text as it is generated; the pieces together are the result.
    """
    teller = None if on_text is None else _Teller(tokenizer, on_text)
    purpose = prompt.cpu().numpy().tobytes().hex()
    with global_stream(seed, "generate", purpose):
        written = network.generate(  # type: ignore[operator]
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            generation_config=_config(network, tokenizer, how),
            streamer=teller,
        )
    return _decoded(tokenizer, written[0, len(prompt) :])


def _config(network: nn.Module, tokenizer: Any, how: Decoding) -> GenerationConfig:
    from transformers import GenerationConfig

    ends = _end_tokens(network, tokenizer)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": how.temperature, "top_k": 0}
    if how.top_p < 1:
        drawn["top_p"] = how.top_p
    return GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **(drawn if how.temperature else {"do_sample": False}),
    )


def _end_tokens(network: Any, tokenizer: Any) -> list[int]:
    """The tokens that end generation: the tokenizer's, and those in the network's configuration."""
    declared = getattr(network.generation_config, "eos_token_id", None) or network.config.eos_token_id
    named = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [tokenizer.eos_token_id, *named] if token is not None})


def _decoded(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


class _Teller:
    """A streamer for transformers' `generate`: gets the prompt, then each token, then a call of `end`."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None
        self._sent_text = ""

    def put(self, tokens: torch.Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += tokens.flatten().tolist()
        self._tell(_decoded(self._tokenizer, self._ids).rstrip(_UNFINISHED).rstrip())

    def end(self) -> None:
        self._tell(_decoded(self._tokenizer, self._ids or []))

    def _tell(self, text: str) -> None:
        """Pass on the new part of the text, unless its beginning has changed since the last call."""
        if len(text) > len(self._sent_text) and text.startswith(self._sent_text):
            self._on_text(text[len(self._sent_text) :])
            self._sent_text = text
