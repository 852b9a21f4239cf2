"""Intent and slot prediction from words: one head for the whole sentence, one for each word."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from atoll.backbones.encoder import Batch, Model
from atoll.backbones.resolve import Backbone
from atoll.job.job import Job
from atoll.protocol.random_streams import global_stream
from atoll.tasks.token_classification.words import NO_WORD, load_word_encoder

MASKED_LOGIT = -1e4
"""The logit of classes that don't exist, in the padding of the narrower head's output."""


class CommandHead(nn.Module):
    """Two linear layers: the intent from the mean state, tags from the states of words' first subwords."""

    def __init__(self, width: int, intents: int, tags: int) -> None:
        super().__init__()
        self.intent = nn.Linear(width, intents)
        self.tag = nn.Linear(width, tags)


class CommandModel(Model):
    """Predicts logits of intents and of each word's tags, [batch, 1 + words, max(intents, tags)]."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits: intents in the first row, then tags; the narrower are padded with `MASKED_LOGIT`."""
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
        """The logits of each sentence without padding, [1 + words, max(intents, tags)] each."""
        words = (batch["first_piece"] != NO_WORD).sum(1).tolist()
        return [scores[: 1 + count] for scores, count in zip(self(batch), words, strict=True)]


def load_command_model(backbone: Backbone, job: Job, intents: int, tags: int) -> CommandModel:
    """The network with its resolved weights and a new head.

    Raises:
        WeightsError: the network isn't a text encoder, or its weights don't fit.
    """
    encoder = load_word_encoder(backbone, job)
    with global_stream(job.seed, "init", "head"):
        head = CommandHead(encoder.width, intents, tags)
    return CommandModel(encoder, head)
