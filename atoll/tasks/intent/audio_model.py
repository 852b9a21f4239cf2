"""Intent prediction from audio: a linear layer on the mean of an audio encoder's states."""

from __future__ import annotations

import torch
from torch import nn

from atoll.backbones.audio import load_sound_encoder, real_frames
from atoll.backbones.encoder import Batch, Model
from atoll.backbones.resolve import Backbone
from atoll.job.job import Job
from atoll.protocol.random_streams import global_stream


class SpokenIntent(Model):
    """Predicts logits of intents from the mean state over frames that aren't padding."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits, [batch, 1, intents]."""
        states, count = self.backbone(batch)
        mask = real_frames(states, count).unsqueeze(2).to(states.dtype)
        scores: torch.Tensor = self.head((states * mask).sum(1) / mask.sum(1))
        return scores.unsqueeze(1)


class SpokenIntentOfFeatures(Model):
    """Predicts logits of intents from one vector of features a recording."""

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits, [batch, 1, intents]."""
        return super().forward(batch).unsqueeze(1)


def load_spoken_model(backbone: Backbone, job: Job, intents: int, max_seconds: float) -> Model:
    """The network with its resolved weights and a new head; a recogniser's output layer is dropped.

    Raises:
        WeightsError: the network reads no audio, or its weights don't fit.
    """
    if backbone.kind == "plugin":
        from atoll.backbones.brought.encoders import brought_sound_encoder  # which not every job needs

        brought = brought_sound_encoder(backbone, job.backbone, job.seed, max_seconds)
        return SpokenIntentOfFeatures(brought, _head(brought.width, intents, job.seed))
    encoder = load_sound_encoder(backbone, job, max_seconds)
    return SpokenIntent(encoder, _head(encoder.width, intents, job.seed))


def _head(width: int, intents: int, seed: int) -> nn.Linear:
    with global_stream(seed, "init", "head"):
        return nn.Linear(width, intents)
