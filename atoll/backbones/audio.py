"""Networks that hear: wav2vec 2.0, HuBERT and the like, Whisper's encoder, or a small one of our own.

`atoll:small-ctc` reads log-mel features: two convolutions, each halving the frames, and a GRU in both
directions, and starts from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.backbones.augmentation import masked_spectrum
from atoll.backbones.brought.augmentations import augmented_sound
from atoll.backbones.brought.names import SPEC_AUGMENT
from atoll.backbones.checkpoint import config_of, load_state_dict_strict, load_transformer, load_weights
from atoll.backbones.ctc_vocabulary import ENGLISH_LETTERS, SMALL_CTC
from atoll.backbones.encoder import Batch, Encoder, FixedInput, Variation
from atoll.backbones.options import RecurrentLayers, options_of
from atoll.backbones.resolve import Backbone
from atoll.backbones.whisper import WHISPER, load_whisper, mel_of
from atoll.data.audio import BANDS, checked_sound, log_mel, normalised
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import Job
from atoll.job.section import Count
from atoll.protocol.random_streams import global_stream


class SmallCtcOptions(RecurrentLayers):
    """`backbone.options` of atoll:small-ctc."""

    width: Count = 96


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
        self.out: nn.Module = nn.Linear(2 * width, letters)

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
    """Sounds of different lengths as one batch, padded behind; here those that our own network hears."""

    def __init__(self, model: nn.Module, width: int, max_seconds: float) -> None:
        super().__init__()
        self.model = model
        self.width = width
        self._max_seconds = max_seconds

    @property
    def letters(self) -> nn.Module | None:
        """The layer inside the network that says letters, where it has one."""
        network: Any = self.model
        layer: nn.Module = network.out
        return layer

    def preprocess(self, inputs: Sequence[bytes]) -> list[torch.Tensor]:
        """What the network takes of each sound, as long as the sound is."""
        return [self.ready(self._samples(data)) for data in inputs]

    def _samples(self, data: bytes) -> NDArray[np.float32]:
        return checked_sound(data, "audio", self._max_seconds)

    def ready(self, samples: NDArray[np.float32]) -> torch.Tensor:
        """What the network takes of a sound's samples, [length, …]."""
        return log_mel(samples)

    def preprocess_and_collate(self, inputs: Sequence[bytes], variation: Variation | None = None) -> Batch:
        if variation is None:
            return self.collate(self.preprocess(inputs))
        varied = (self._varied(self._samples(data), variation, place) for place, data in enumerate(inputs))
        return self.collate(list(varied))

    def _varied(self, samples: NDArray[np.float32], variation: Variation, place: int) -> torch.Tensor:
        """What the network takes of a sound, varied at random: samples by extensions, then its spectrum."""
        draw = variation.stream(place)
        if variation.brought:
            samples = augmented_sound(torch.from_numpy(samples), variation.brought, draw).numpy()
        ready = self.ready(samples)
        return self.masked(ready, draw) if SPEC_AUGMENT in variation.names else ready

    def masked(self, ready: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """A spectrum of which bands and frames are hidden."""
        return masked_spectrum(ready, draw)

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        lengths = torch.tensor([len(one) for one in ready])
        return {"sound": nn.utils.rnn.pad_sequence(list(ready), batch_first=True), "length": lengths}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """([batch, frames, width], how many of them are real); padding of others changes no real frame."""
        states, count = self.model(batch["sound"], batch["length"])
        return states, count


class WaveEncoder(SoundEncoder):
    """A network of transformers' that reads the wave itself."""

    @property
    def letters(self) -> nn.Module | None:
        return getattr(self.model, "lm_head", None)

    def ready(self, samples: NDArray[np.float32]) -> torch.Tensor:
        return normalised(samples)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        network: Any = self.model
        trunk = getattr(network, network.base_model_prefix, network)
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


class MelEncoder(SoundEncoder):
    """Whisper's encoder, which hears a window of one length, whatever is in it.

    Silence fills the window, and the network listens to it too, as it was trained to. So a window is as
    long as the job says a recording may be, for every sound and in every batch.
    """

    @property
    def letters(self) -> nn.Module | None:
        return None

    @property
    def fixed_input(self) -> FixedInput:
        network: Any = self.model
        return FixedInput(
            "sound", (self._frames, int(network.config.num_mel_bins)), beside={"length": self._frames}
        )

    @property
    def _frames(self) -> int:
        """Of a window, before the network halves them."""
        network: Any = self.model
        return 2 * int(network.config.max_source_positions)

    def ready(self, samples: NDArray[np.float32]) -> torch.Tensor:
        network: Any = self.model
        return mel_of(samples, network.config)

    def masked(self, ready: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        return torch.cat([masked_spectrum(ready[:-1], draw), ready[-1:]])

    def collate(self, ready: Sequence[torch.Tensor]) -> Batch:
        """The last row of each is the silence that follows it."""
        frames = self._frames
        filled = [torch.cat([one[:-1], one[-1:].expand(frames - len(one) + 1, -1)]) for one in ready]
        return {"sound": torch.stack(filled), "length": torch.tensor([len(one) - 1 for one in ready])}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        count = (batch["length"] + 1) // 2
        states = self.model(batch["sound"].transpose(1, 2)).last_hidden_state
        return states[:, : int(count.max())], count


def load_sound_encoder(
    backbone: Backbone, job: Job, max_seconds: float, letters: int | None = None
) -> SoundEncoder:
    """Build the network with its resolved weights; with an output layer inside for that many letters.

    Without `letters` there is none inside, and that of a checkpoint is left out. Whisper has none ever.

    Raises:
        WeightsError: it doesn't hear, or its weights don't fit.
        ConfigError: what it hears is to vary, and can't.
    """
    if (backbone.kind, backbone.name) == ("atoll", SMALL_CTC):
        return _small(backbone, job, max_seconds, letters)
    if backbone.kind != "hf" or backbone.folder is None:
        raise WeightsError(
            f"backbone.name: {job.backbone.name} does not hear, expected atoll:{SMALL_CTC}, hf:NAME or"
            " a folder of a network such as wav2vec2 or Whisper"
        )
    config = config_of(backbone)
    if config.model_type == WHISPER:
        network = load_whisper(backbone, job.seed, config, max_seconds)
        return MelEncoder(network, int(config.d_model), max_seconds)
    if not hasattr(config, "conv_stride") or not hasattr(config, "feat_extract_norm"):
        raise WeightsError(
            f"{backbone.folder}: {config.model_type} does not read waves, expected wav2vec2 or {WHISPER}"
        )
    if SPEC_AUGMENT in job.train.augment:
        raise ConfigError(
            f"train.augment: {config.model_type} reads waves, of which there is no spectrum to mask;"
            f" expected an extension's, or a network such as atoll:{SMALL_CTC} or {WHISPER}"
        )
    # What it masks it would draw from NumPy's global generator.
    config.apply_spec_augment = False
    if letters is not None:
        config.vocab_size = letters
    network = load_transformer(
        backbone,
        job.seed,
        "AutoModel" if letters is None else "AutoModelForCTC",
        config=config,
        fresh=("lm_head.", "masked_spec_embed"),
    )
    adapted = getattr(config, "add_adapter", False)
    return WaveEncoder(
        network, int(config.output_hidden_size if adapted else config.hidden_size), max_seconds
    )


def _small(backbone: Backbone, job: Job, max_seconds: float, letters: int | None) -> SoundEncoder:
    known = options_of(job.backbone.options, SmallCtcOptions, "backbone.options")
    with global_stream(job.seed, "init", "backbone"):
        small = SmallCtc(known, letters or ENGLISH_LETTERS.size)
    if letters is None:
        small.out = nn.Identity()
    if backbone.weights is not None:
        ignored = ("out.",) if letters is None else ()
        load_state_dict_strict(small, load_weights(backbone.weights), backbone.weights, ignore=ignored)
    return SoundEncoder(small, 2 * known.width, max_seconds)
