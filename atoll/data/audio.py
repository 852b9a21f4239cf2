"""Recorded speech as samples: WAV and FLAC of any rate become 16 kHz, one channel."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.errors import DataError

AUDIO_SUFFIXES = (".wav", ".flac")
"""What files of recordings are called."""
RATE = 16_000
SHORTEST_SECONDS = 0.05


def checked_sound(
    data: bytes, where: str, max_seconds: float, key: str = "task.options.max_seconds"
) -> NDArray[np.float32]:
    """Samples at `RATE`, the mean over channels; `key` is the job's for `max_seconds`, for the error.

    Raises:
        DataError: it can't be decoded, is too short or too long, or holds a sample that isn't a number.
    """
    import soundfile
    from scipy.signal import resample_poly

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            seconds, rate = file.frames / file.samplerate, file.samplerate
            if not SHORTEST_SECONDS <= seconds <= max_seconds:
                raise DataError(
                    f"{where}: {seconds:.2f} seconds, expected {SHORTEST_SECONDS} to {max_seconds:g}"
                    + (f" ({key})" if key else "")
                )
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        why = (str(error).strip().splitlines() or ["it gave no reason"])[0]
        raise DataError(f"{where}: not a sound that can be read ({why}), expected WAV or FLAC") from None
    if not np.isfinite(samples).all():
        raise DataError(f"{where}: a sample is not a finite number")
    step = math.gcd(RATE, rate)
    if rate == RATE:
        return np.asarray(samples, dtype=np.float32)
    return np.asarray(resample_poly(samples, RATE // step, rate // step), dtype=np.float32)


def normalised(samples: NDArray[np.float32]) -> torch.Tensor:
    """The waveform with mean 0 and deviation 1, as wav2vec 2.0 takes it."""
    wave = torch.from_numpy(samples)
    return (wave - wave.mean()) / (wave.var(unbiased=False) + 1e-7).sqrt()


FRAME, HOP, BANDS = 400, 160, 40
"""Of log-mel features: 25 ms of samples every 10 ms, in 40 bands."""

_TRANSFORM = 512
_LOWEST, _HIGHEST = 20.0, 7600.0


def log_mel(samples: NDArray[np.float32]) -> torch.Tensor:
    """Log energies [frames, bands]; each band has mean 0 and deviation 1 over the sound's own frames.

    So how loud a band is the whole time isn't seen: words are told by what changes.
    """
    bands = _log_energies(samples)
    bands = (bands - bands.mean(1, keepdim=True)) / (bands.std(1, keepdim=True) + 1e-3)
    return bands.T.contiguous()


def spectrogram(samples: NDArray[np.float32]) -> torch.Tensor:
    """Log energies [frames, bands] with mean 0 and deviation 1 over the whole sound."""
    bands = _log_energies(samples)
    return ((bands - bands.mean()) / (bands.std() + 1e-3)).T.contiguous()


def _log_energies(samples: NDArray[np.float32]) -> torch.Tensor:
    """[bands, frames]."""
    window = torch.hann_window(FRAME)
    wave = torch.from_numpy(samples)
    if len(wave) <= _TRANSFORM:
        wave = torch.nn.functional.pad(wave, (0, _TRANSFORM + 1 - len(wave)))
    energy = torch.stft(wave, _TRANSFORM, HOP, FRAME, window, return_complex=True).abs().square()
    return torch.log(_bank() @ energy + 1e-6)


def frames_of(seconds: float) -> int:
    """How many frames `log_mel` makes of a sound of that length."""
    return 1 + int(seconds * RATE) // HOP


def _bank() -> torch.Tensor:
    """Triangles on the mel scale, [bands, frequencies]."""
    mels = torch.linspace(_mel(_LOWEST), _mel(_HIGHEST), BANDS + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.arange(_TRANSFORM // 2 + 1, dtype=torch.float64) * RATE / _TRANSFORM
    low, middle, high = (corners[start : start + BANDS].unsqueeze(1) for start in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0).to(torch.float32)


def _mel(frequency: float) -> float:
    return 2595 * math.log10(1 + frequency / 700)
