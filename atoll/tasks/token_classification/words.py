"""Encoders of sentences given as words, which track the first subword of each word.

The encoder is a transformers model (BERT, MiniLM, …), or `atoll:small-text`, a small transformer without
pretrained weights. Subwords are called pieces here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_transformer, load_weights
from atoll.backbones.encoder import Batch, Encoder
from atoll.backbones.options import options_of
from atoll.backbones.resolve import Backbone
from atoll.backbones.small_tokenizer import own_tokenizer, vocabulary
from atoll.backbones.text import load_tokenizer, longest, padded, without_pooler
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection, Job
from atoll.job.section import Count, Decay, Section
from atoll.protocol.random_streams import global_stream

SMALL_TEXT = "small-text"
LONGEST = 512

CUT_OFF, NO_WORD = -1, -2
"""Used in place of the index of a word's first piece: the piece was cut off; there is no word (padding)."""


class SmallTextOptions(Section):
    """`backbone.options` of atoll:small-text."""

    width: Count = 64
    layers: Count = 2
    heads: Count = 4
    dropout: Decay = 0.0


class SmallText(nn.Module):
    """A small transformer encoder with learnt positions; its states are [batch, pieces, width]."""

    def __init__(self, known: SmallTextOptions) -> None:
        super().__init__()
        width = known.width
        self.pieces = nn.Embedding(len(vocabulary()), width)
        self.places = nn.Embedding(LONGEST, width)
        for table in (self.pieces, self.places):
            nn.init.normal_(table.weight, std=0.1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, known.heads, 2 * width, known.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(known.layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # Positions as a batch of ids, so that per-example gradients of their embedding can be computed.
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        states = self.pieces(input_ids) + self.places(places)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=attention_mask == 0)
        normed: torch.Tensor = self.norm(states)
        return normed


class WordPieces:
    """Tokenizes sentences given as words; a sentence has at most `max_tokens` pieces."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._with_spaces = _tells_words_by_spaces(tokenizer)
        self.pad: int = tokenizer.pad_token_id or 0

    def coded(self, inputs: Sequence[Sequence[str]]) -> list[Batch]:
        """For each sentence `ids` [pieces], and `first` [words], the index of each word's first piece.

        The index is `CUT_OFF` for a word without a piece within `max_tokens`.
        """
        between = " " if self._with_spaces else ""
        coded = self._tokenizer(
            [[f"{between if place else ''}{word}" for place, word in enumerate(words)] for words in inputs],
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_tokens,
            padding=False,
        )
        sentences = []
        for number, words in enumerate(inputs):
            of_piece = coded.word_ids(number)
            first = [of_piece.index(word) if word in of_piece else CUT_OFF for word in range(len(words))]
            ids = torch.tensor(coded["input_ids"][number], dtype=torch.int64)
            sentences.append({"ids": ids, "first": torch.tensor(first, dtype=torch.int64)})
        return sentences


def _tells_words_by_spaces(tokenizer: Any) -> bool:
    """Whether a word's pieces depend on a space before it, which must then be added to words given singly.

    True of byte-level tokenizers (GPT-2, RoBERTa), unless the tokenizer adds the spaces itself.
    """
    splits = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    parts = splits.get("pretokenizers", [splits])
    return any(part.get("type") == "ByteLevel" and not part.get("add_prefix_space") for part in parts)


class WordEncoder(Encoder):
    """Encodes sentences given as words; batches also have the index of each word's first piece."""

    reads_tokens = True

    def __init__(self, model: nn.Module, width: int, pieces: WordPieces) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._pieces = pieces

    def preprocess(self, inputs: Sequence[Sequence[str]]) -> list[Batch]:
        """As `WordPieces.coded`."""
        return self._pieces.coded(inputs)

    def collate(self, ready: Sequence[Batch]) -> Batch:
        table = padded([one["ids"] for one in ready], self._pieces.pad)
        first = [one["first"] for one in ready]
        words = nn.utils.rnn.pad_sequence(first, batch_first=True, padding_value=NO_WORD)
        return table | {"first_piece": words}

    def forward(self, batch: Batch) -> torch.Tensor:
        """The states of all pieces, [batch, pieces, width]."""
        states = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        hidden: torch.Tensor = states if isinstance(states, torch.Tensor) else states.last_hidden_state
        return hidden


def load_word_encoder(backbone: Backbone, job: Job) -> WordEncoder:
    """The encoder with its resolved weights.

    Raises:
        WeightsError: the network isn't a text encoder, or its weights don't fit.
        ConfigError: `backbone.options` are invalid.
    """
    if not is_small_text(backbone):
        tokenizer = word_tokenizer(backbone)
        network = load_transformer(backbone, job.seed)
        network = network.encoder if network.config.is_encoder_decoder else network
        pieces = WordPieces(tokenizer, min(job.backbone.max_tokens, longest(tokenizer, network)))
        return WordEncoder(without_pooler(network), int(network.config.hidden_size), pieces)
    known = options_of(job.backbone.options, SmallTextOptions, "backbone.options")
    if known.width % known.heads:
        raise ConfigError(
            f"backbone.options.heads: expected a divisor of width = {known.width}, found {known.heads}"
        )
    with global_stream(job.seed, "init", "backbone"):
        small = SmallText(known)
    if backbone.weights is not None:
        load_state_dict_strict(small, load_weights(backbone.weights), backbone.weights)
    return WordEncoder(small, known.width, word_pieces(backbone, job.backbone))


def word_pieces(backbone: Backbone, section: BackboneSection) -> WordPieces:
    """The tokenizing of words for this backbone, without loading the network.

    Raises:
        WeightsError: the network isn't a text encoder.
    """
    if is_small_text(backbone):
        return WordPieces(own_tokenizer(), min(section.max_tokens, LONGEST))
    from transformers import AutoConfig

    tokenizer = word_tokenizer(backbone)
    config = AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
    return WordPieces(tokenizer, min(section.max_tokens, longest(tokenizer, SimpleNamespace(config=config))))


def is_small_text(backbone: Backbone) -> bool:
    """Whether the backbone is `atoll:small-text`."""
    return (backbone.kind, backbone.name) == ("atoll", SMALL_TEXT)


def word_tokenizer(backbone: Backbone) -> Any:
    """The tokenizer in a network's folder; it can map pieces to words.

    Raises:
        WeightsError: the network isn't a text encoder, or its tokenizer can't map pieces to words.
    """
    if backbone.kind != "hf" or backbone.folder is None:
        backbone_name = f"{backbone.kind}:{backbone.name}"
        raise WeightsError(
            f"backbone.name: {backbone_name} does not read words,"
            f" expected atoll:{SMALL_TEXT}, hf:NAME or a folder"
        )
    tokenizer = load_tokenizer(backbone.folder)
    if not tokenizer.is_fast:
        raise WeightsError(f"{backbone.folder}: its tokenizer can't tell words apart, expected a fast one")
    return tokenizer
