"""Whisper's encoder (Radford et al. 2022), without its decoder: mel features to 50 states a second."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.backbones.checkpoint import load_state_dict_strict, load_weights
from atoll.backbones.resolve import Backbone, is_run_checkpoint, weight_files
from atoll.data.audio import RATE
from atoll.errors import ConfigError, WeightsError
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import WhisperFeatureExtractor

WHISPER = "whisper"
"""What transformers calls the type of the model."""

STATES_A_SECOND = 50
_HOP, _FRAME = 160, 400
_INSIDE = ("model.encoder.", "encoder.")


def mel_of(samples: NDArray[np.float32], config: Any) -> torch.Tensor:
    """Mel features [frames + 1, bands] as Whisper takes them of the sound in its window of silence.

    The frames that hear any of the sound, and behind them one of the silence that fills the window.
    """
    window = 2 * _HOP * int(config.max_source_positions)
    mel = _extractor(int(config.num_mel_bins))(
        samples, sampling_rate=RATE, max_length=window, return_tensors="pt"
    ).input_features[0]
    # Frames lie around every 160th sample, the first one around the first.
    heard = min(mel.shape[1], -(-(len(samples) + _FRAME // 2) // _HOP))
    silence = mel[:, heard : heard + 1] if heard < mel.shape[1] else mel[:, -1:]
    padded: torch.Tensor = torch.cat([mel[:, :heard], silence], dim=1).T.contiguous()
    return padded


@cache
def _extractor(bands: int) -> WhisperFeatureExtractor:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=bands)


def load_whisper(backbone: Backbone, seed: int, config: Any, max_seconds: float) -> nn.Module:
    """The encoder in eval mode, with a window of `max_seconds`: it then has the first places only.

    Raises:
        ConfigError: Whisper's own window is shorter than that.
        WeightsError: a tensor is missing, or of another shape.
    """
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    longest = config.max_source_positions / STATES_A_SECOND
    if max_seconds > longest:
        raise ConfigError(
            f"task.options.max_seconds: {backbone.name} hears at most {longest:g} seconds,"
            f" found {max_seconds:g}"
        )
    config.max_source_positions = math.ceil(max_seconds * STATES_A_SECOND)
    with global_stream(seed, "init", "backbone"):
        network: nn.Module = WhisperEncoder(config)
    if backbone.weights is not None:
        stored = _encoder_of(backbone.weights)
        places = stored.get("embed_positions.weight")
        if places is not None:
            stored["embed_positions.weight"] = places[: config.max_source_positions]
        load_state_dict_strict(network, stored, backbone.weights)
    return network.eval()


def _encoder_of(weights: Path) -> Tensors:
    """The encoder's tensors by its own names, of a checkpoint with or without decoder, or of a run."""
    files = weight_files(weights) if weights.is_dir() else [weights]
    tensors = {name: tensor for file in files for name, tensor in load_weights(file).items()}
    if is_run_checkpoint(files[0]):
        return tensors
    for prefix in _INSIDE:
        encoder = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if encoder:
            return encoder
    raise WeightsError(f"{weights}: holds no encoder, expected tensors called {_INSIDE[0]}…")
