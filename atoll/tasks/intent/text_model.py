"""Networks that read a sentence's words: what is meant by all of them, and a tag for each.

The encoder is one of transformers' (BERT, MiniLM, …), or `atoll:small-text`: pieces, places and a
transformer, without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from atoll.backbones.checkpoint import load_state_dict_strict, load_transformer, load_weights
from atoll.backbones.encoder import Batch, Encoder, Model
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
MASKED_LOGIT = -1e4
"""The score of what can't be."""

CUT_OFF, NO_WORD = -1, -2
"""Instead of the place of a word's first piece: the piece isn't there, or not even the word."""


class SmallTextOptions(Section):
    """`backbone.options` of atoll:small-text."""

    width: Count = 64
    layers: Count = 2
    heads: Count = 4
    dropout: Decay = 0.0


class SmallText(nn.Module):
    """Pieces to states [batch, pieces, width]."""

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
        # Places as rows of ids, so that every example has gradients of its own there.
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        states = self.pieces(input_ids) + self.places(places)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=attention_mask == 0)
        normed: torch.Tensor = self.norm(states)
        return normed


class WordEncoder(Encoder):
    """Sentences of words as pieces, and where each word begins."""

    def __init__(self, model: nn.Module, width: int, tokenizer: Any, section: BackboneSection) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._tokenizer = tokenizer
        most = LONGEST if isinstance(model, SmallText) else longest(tokenizer, model)
        self._max_tokens = min(section.max_tokens, most)

    def preprocess(self, inputs: Sequence[Sequence[str]]) -> list[Batch]:
        """Pieces, and for each word the place of its first one, or `CUT_OFF`."""
        coded = self._tokenizer(
            [list(words) for words in inputs],
            is_split_into_words=True,
            truncation=True,
            max_length=self._max_tokens,
            padding=False,
        )
        found = []
        for number, words in enumerate(inputs):
            of_piece = coded.word_ids(number)
            first = [of_piece.index(word) if word in of_piece else CUT_OFF for word in range(len(words))]
            ids = torch.tensor(coded["input_ids"][number], dtype=torch.int64)
            found.append({"ids": ids, "first": torch.tensor(first, dtype=torch.int64)})
        return found

    def collate(self, ready: Sequence[Batch]) -> Batch:
        table = padded([one["ids"] for one in ready], self._tokenizer.pad_token_id or 0)
        first = [one["first"] for one in ready]
        words = nn.utils.rnn.pad_sequence(first, batch_first=True, padding_value=NO_WORD)
        return table | {"first_piece": words}

    def forward(self, batch: Batch) -> torch.Tensor:
        """States of all pieces, [batch, pieces, width]."""
        states = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found: torch.Tensor = states if isinstance(states, torch.Tensor) else states.last_hidden_state
        return found


class CommandHead(nn.Module):
    """An intent from the mean of the states, a tag from the first piece of each word."""

    def __init__(self, width: int, intents: int, tags: int) -> None:
        super().__init__()
        self.intent = nn.Linear(width, intents)
        self.tag = nn.Linear(width, tags)


class CommandModel(Model):
    """Scores of intents, and behind them of each word's tags: [batch, 1 + words, most of either]."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """Where there are fewer intents than tags, or the other way round, the rest has no chance."""
        head: Any = self.head
        states = self.backbone(batch)
        mask = batch["attention_mask"].unsqueeze(2).to(states.dtype)
        intent = head.intent((states * mask).sum(1) / mask.sum(1)).unsqueeze(1)
        place = batch["first_piece"].clamp_min(0).unsqueeze(2)
        tags = head.tag(torch.take_along_dim(states, place, dim=1))
        most = max(intent.shape[2], tags.shape[2])
        filled = (nn.functional.pad(s, (0, most - s.shape[2]), value=MASKED_LOGIT) for s in (intent, tags))
        return torch.cat(list(filled), dim=1)

    def predict(self, batch: Batch) -> list[torch.Tensor]:
        """The scores of each sentence, as long as it has words: [1 + words, most of either]."""
        words = (batch["first_piece"] != NO_WORD).sum(1).tolist()
        return [scores[: 1 + count] for scores, count in zip(self(batch), words, strict=True)]


def load_command_model(backbone: Backbone, job: Job, intents: int, tags: int) -> CommandModel:
    """Build the network with its resolved weights, and a fresh head.

    Raises:
        WeightsError: it isn't an encoder of texts, or its weights don't fit.
    """
    encoder = _encoder(backbone, job)
    with global_stream(job.seed, "init", "head"):
        head = CommandHead(encoder.width, intents, tags)
    return CommandModel(encoder, head)


def _encoder(backbone: Backbone, job: Job) -> WordEncoder:
    if (backbone.kind, backbone.name) == ("atoll", SMALL_TEXT):
        known = options_of(job.backbone.options, SmallTextOptions, "backbone.options")
        if known.width % known.heads:
            raise ConfigError(
                f"backbone.options.heads: expected a divisor of width = {known.width}, found {known.heads}"
            )
        with global_stream(job.seed, "init", "backbone"):
            small = SmallText(known)
        if backbone.weights is not None:
            load_state_dict_strict(small, load_weights(backbone.weights), backbone.weights)
        return WordEncoder(small, known.width, own_tokenizer(), job.backbone)
    if backbone.kind != "hf" or backbone.folder is None:
        raise WeightsError(
            f"backbone.name: {job.backbone.name} does not read words,"
            f" expected atoll:{SMALL_TEXT}, hf:NAME or a folder"
        )
    tokenizer = load_tokenizer(backbone.folder)
    if not tokenizer.is_fast:
        raise WeightsError(f"{backbone.folder}: its tokenizer can't tell words apart, expected a fast one")
    network = load_transformer(backbone, job.seed)
    network = network.encoder if network.config.is_encoder_decoder else network
    return WordEncoder(without_pooler(network), int(network.config.hidden_size), tokenizer, job.backbone)
