"""A linear layer on the state of each word's first subword, as in BERT (Devlin et al. 2019, section 5.3)."""

from __future__ import annotations

import torch
from torch import nn

from atoll.backbones.encoder import Batch, Model
from atoll.backbones.resolve import Backbone
from atoll.job.job import Job
from atoll.protocol.random_streams import global_stream
from atoll.tasks.token_classification.words import NO_WORD, load_word_encoder


class TagModel(Model):
    """Predicts logits of each word's tags, followed by whether the word was read: [batch, words, tags + 1].

    A word isn't read if its first subword is beyond the network's maximum length, or if it has no subword.
    """

    def forward(self, batch: Batch) -> torch.Tensor:
        """[batch, words, tags + 1]; the logits of words that weren't read are meaningless."""
        first = batch["first_piece"]
        states = torch.take_along_dim(self.backbone(batch), first.clamp_min(0).unsqueeze(2), dim=1)
        scores: torch.Tensor = self.head(states)
        return torch.cat([scores, (first >= 0).unsqueeze(2).to(scores.dtype)], dim=2)

    def predict(self, batch: Batch) -> list[torch.Tensor]:
        """The output of each sentence without padding, [words, tags + 1] each."""
        words = (batch["first_piece"] != NO_WORD).sum(1).tolist()
        return [scores[:count] for scores, count in zip(self(batch), words, strict=True)]


def load_tag_model(backbone: Backbone, job: Job, tags: int) -> TagModel:
    """The network with its resolved weights and a new head for `tags` tags.

    Raises:
        WeightsError: the network isn't a text encoder, or its weights don't fit.
    """
    encoder = load_word_encoder(backbone, job)
    with global_stream(job.seed, "init", "head"):
        head = nn.Linear(encoder.width, tags)
    return TagModel(encoder, head)
