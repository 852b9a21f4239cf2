"""CTC models: predict logits of letters at each frame of a recording."""

from __future__ import annotations

import torch
from torch import nn

from atoll.backbones.audio import SoundEncoder, load_sound_encoder, real_frames
from atoll.backbones.checkpoint import pretrained_names
from atoll.backbones.ctc_vocabulary import CtcVocabulary
from atoll.backbones.encoder import Batch, Model
from atoll.backbones.resolve import Backbone
from atoll.job.job import Job
from atoll.protocol.random_streams import global_stream

MASKED_LOGIT = -1e4
"""The logit of letters in frames of padding, where the blank's logit is 0."""


class Recogniser(Model):
    """Predicts logits of letters at each frame."""

    def __init__(
        self,
        backbone: SoundEncoder,
        head: nn.Module,
        letters: CtcVocabulary,
        pretrained_head: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(backbone, head, pretrained_head)
        self._letters = letters

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [batch, frames, symbols]; frames of padding predict blank, which changes no likelihood."""
        states, count = self.backbone(batch)
        assert isinstance(self.backbone, SoundEncoder)
        # LoRA may have replaced the layer inside the network by a wrapper with its factors.
        inside = self.backbone.letters
        scores: torch.Tensor = (self.head if inside is None else inside)(states)
        padding = _padding(scores, self._letters.blank)
        return torch.where(real_frames(states, count).unsqueeze(2), scores, padding)

    def predict(self, batch: Batch) -> list[str]:
        """The recognised texts, in lower case."""
        return self._letters.texts(self.forward(batch))


def _padding(scores: torch.Tensor, blank: int) -> torch.Tensor:
    """The logits of a frame of padding, [symbols]."""
    row = torch.full_like(scores[0, 0], MASKED_LOGIT)
    row[blank] = 0.0
    return row


def real_counts(scores: torch.Tensor, blank: int) -> torch.Tensor:
    """The number of frames of each recording that aren't padding, [batch], from logits."""
    return (scores != _padding(scores, blank)).any(2).sum(1)


def load_recogniser(backbone: Backbone, job: Job, letters: CtcVocabulary, max_seconds: float) -> Recogniser:
    """The network with its resolved weights; its head is its output layer.

    A new output layer is made for Whisper's encoder, which has none, and for checkpoints without one
    (wav2vec2-base).

    Raises:
        WeightsError: the network reads no audio, or its weights don't fit.
    """
    encoder = load_sound_encoder(backbone, job, max_seconds, letters.size)
    head, loaded = encoder.letters, frozenset[str]()
    if head is None:
        with global_stream(job.seed, "init", "head"):
            head = nn.Linear(encoder.width, letters.size)
    else:
        place = next(name for name, module in encoder.model.named_modules() if module is head)
        loaded = pretrained_names(encoder.model, place, backbone)
    return Recogniser(encoder, head, letters, loaded)
