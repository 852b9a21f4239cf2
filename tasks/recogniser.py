"""Networks that hear letters: wav2vec 2.0, HuBERT and the like with CTC, or a small one of our own.

`atoll:small-ctc` reads log-mel features: two convolutions, each halving the frames, and a GRU in both
directions, and starts from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from protocol.errors import WeightsError
from protocol.job import Job
from protocol.section import Count, Decay, Section
from protocol.streams import global_stream
from tasks.letters import Letters
from tasks.loading import fill, load_transformer, load_weights
from tasks.options import options_of
from tasks.seam import Batch, Encoder, Model
from tasks.sounds import BANDS, checked_sound, log_mel, normalised
from tasks.weights import Backbone

SMALL = "small-ctc"
SURELY_NOT = -1e4
"""The score of letters in frames of padding, where the blank has 0."""


class SmallCtcOptions(Section):
    """`backbone.options` of atoll:small-ctc."""

    width: Count = 96
    layers: Count = 1
    dropout: Decay = 0.0


class SmallCtc(nn.Module):
    """Log-mel features to scores of letters at a quarter of the frames."""

    def __init__(self, known: SmallCtcOptions, letters: int) -> None:
        super().__init__()
        width = known.width
        self.first = nn.Conv1d(BANDS, width, 5, stride=2, padding=2)
        self.first_norm = nn.LayerNorm(width)
        self.second = nn.Conv1d(width, width, 5, stride=2, padding=2)
        self.second_norm = nn.LayerNorm(width)
        self.recurrent = nn.GRU(
            width, width, known.layers, bidirectional=True, batch_first=True, dropout=known.dropout
        )
        self.out = nn.Linear(2 * width, letters)

    def forward(self, sound: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([batch, frames, width], how many of them are real)."""
        states, count = sound, length
        for convolution, norm in ((self.first, self.first_norm), (self.second, self.second_norm)):
            states = states * real_frames(states, count).unsqueeze(2)
            states = norm(torch.relu(convolution(states.transpose(1, 2))).transpose(1, 2))
            count = (count + 1) // 2
        packed = nn.utils.rnn.pack_padded_sequence(
            states, count.cpu(), batch_first=True, enforce_sorted=False
        )
        heard, _ = nn.utils.rnn.pad_packed_sequence(
            self.recurrent(packed)[0], batch_first=True, total_length=states.shape[1]
        )
        return heard, count


def real_frames(states: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which frames aren't padding, [batch, frames]."""
    return torch.arange(states.shape[1], device=states.device) < count.unsqueeze(1)


class SoundEncoder(Encoder):
    """Sounds of different lengths as one batch, padded behind."""

    def __init__(self, model: nn.Module, width: int, max_seconds: float) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._max_seconds = max_seconds

    def ready(self, inputs: Sequence[bytes]) -> list[torch.Tensor]:
        made = log_mel if isinstance(self.model, SmallCtc) else normalised
        return [made(checked_sound(data, "audio", self._max_seconds)) for data in inputs]

    def batch(self, ready: Sequence[torch.Tensor]) -> Batch:
        lengths = torch.tensor([len(one) for one in ready])
        return {"sound": nn.utils.rnn.pad_sequence(list(ready), batch_first=True), "length": lengths}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """([batch, frames, width], how many of them are real); padding of others changes no real frame."""
        if isinstance(self.model, SmallCtc):
            states, count = self.model(batch["sound"], batch["length"])
            return states, count
        network: Any = self.model
        trunk = getattr(network, network.base_model_prefix)
        count = network._get_feat_extract_output_lengths(batch["length"])
        if network.config.feat_extract_norm == "group":
            # Its norm runs over a sound's frames, so that padding would move them: one after the other.
            each = [
                trunk(sound[:length].unsqueeze(0)).last_hidden_state[0]
                for sound, length in zip(batch["sound"], batch["length"].tolist(), strict=True)
            ]
            return nn.utils.rnn.pad_sequence(each, batch_first=True), count
        mask = real_frames(batch["sound"], batch["length"])
        return trunk(batch["sound"], attention_mask=mask.long()).last_hidden_state, count


class Recogniser(Model):
    """Scores of letters at each frame."""

    def __init__(self, backbone: SoundEncoder, head: nn.Module, letters: Letters) -> None:
        super().__init__(backbone, head)
        self._letters = letters

    def forward(self, batch: Batch) -> torch.Tensor:
        """[batch, frames, symbols]; frames of padding say blank for certain, which changes no likelihood."""
        states, count = self.backbone(batch)
        scores: torch.Tensor = self.head(states)
        padding = torch.full_like(scores[0, 0], SURELY_NOT)
        padding[self._letters.blank] = 0.0
        return torch.where(real_frames(states, count).unsqueeze(2), scores, padding)

    def predict(self, batch: Batch) -> list[str]:
        """What is heard, in lower case."""
        return self._letters.texts(self.forward(batch))


def load_recogniser(backbone: Backbone, job: Job, letters: Letters, max_seconds: float) -> Recogniser:
    """Build the network with its resolved weights; its head is its output layer.

    A checkpoint without an output layer (wav2vec2-base) gets a fresh one.

    Raises:
        WeightsError: it doesn't hear letters, or its weights don't fit.
    """
    if (backbone.kind, backbone.name) == ("atoll", SMALL):
        known = options_of(job.backbone.options, SmallCtcOptions, "backbone.options")
        with global_stream(job.seed, "init", "backbone"):
            small = SmallCtc(known, letters.size)
        if backbone.weights is not None:
            fill(small, load_weights(backbone.weights), backbone.weights)
        return Recogniser(SoundEncoder(small, 2 * known.width, max_seconds), small.out, letters)
    if backbone.kind != "hf" or backbone.folder is None:
        raise WeightsError(
            f"backbone.name: {job.backbone.name} does not hear letters, expected atoll:{SMALL}, hf:NAME or"
            " a folder of a network with CTC such as wav2vec2"
        )
    network = load_transformer(backbone, job.seed, "AutoModelForCTC", config=_config(backbone, letters),
                               fresh=("lm_head.", "masked_spec_embed"))  # fmt: skip
    return Recogniser(
        SoundEncoder(network, network.lm_head.in_features, max_seconds), network.lm_head, letters
    )


def _config(backbone: Backbone, letters: Letters) -> Any:
    """The folder's configuration, with an output for each letter and nothing masked at random."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(backbone.folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        raise WeightsError(f"{backbone.folder}: transformers cannot load it: {why}") from None
    if not hasattr(config, "conv_stride") or not hasattr(config, "feat_extract_norm"):
        raise WeightsError(f"{backbone.folder}: {config.model_type} does not read waves, expected wav2vec2")
    # What it masks it would draw from NumPy's global generator.
    config.apply_spec_augment = False
    config.vocab_size = letters.size
    return config
