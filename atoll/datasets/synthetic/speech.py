"""`generated-speech`: short sentences spoken by espeak-ng in several voices.

The same bytes for the same seed and the same version of espeak-ng, whose formant synthesis draws nothing.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import wave
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.datasets.synthetic.commands import INTENTS, command
from atoll.datasets.synthetic.drawing import cut
from atoll.errors import DataError
from atoll.protocol.random_streams import stream_seed

RATE = 16_000
_PROGRAM = "espeak-ng"
_HEADER = 44
_PROGRAM_RATE = 22_050
_PATIENCE_SECONDS = 60
_PROCESSES = 4
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "pink", "grey")
_AUDIO_CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclass(frozen=True)
class Voice:
    """How one speaker speaks: espeak-ng's voice, words a minute, pitch 0..99."""

    name: str
    speed: int
    pitch: int


VOICES = (
    Voice("en-us", 165, 45), Voice("en-us+f2", 175, 60), Voice("en-us+m3", 160, 35),
    Voice("en-us+f4", 185, 70), Voice("en-gb", 170, 50), Voice("en-029+f5", 160, 65),
    Voice("en-us+m7", 180, 40), Voice("en-gb-x-rp+f4", 190, 55), Voice("en-gb-scotland", 165, 48),
    Voice("en-gb-scotland+f2", 175, 62), Voice("en-029", 170, 42), Voice("en-gb-x-rp+m7", 180, 52),
)  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """What is said; digits and colours are intents of their own, without slots."""

    text: str
    intent: str
    slots: str


def generated_speech(seed: int = 0, count: int = 600) -> dict[str, pa.Table]:
    """Clips of a second or two: columns audio (16 kHz mono 16-bit WAV), transcript, speaker, intent, slots.

    A quarter are digits, a quarter colours, half commands. No sentence of the test split is in the training
    split; every speaker is in both.

    Raises:
        DataError: espeak-ng isn't installed, or fails.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-speech"))
    sentences = _sentences(rng, count)
    speakers = [int(speaker) for speaker in rng.integers(0, len(VOICES), count)]
    more = {"intent": [s.intent for s in sentences], "slots": [s.slots for s in sentences]}
    return cut(recordings([s.text for s in sentences], speakers, VOICES, more))


def recordings(
    texts: Sequence[str],
    speakers: Sequence[int],
    voices: Sequence[Voice],
    more: Mapping[str, Sequence[str]] | None = None,
) -> pa.Table:
    """Each text spoken by its speaker: columns audio, transcript, speaker, and those of `more`.

    Raises:
        DataError: espeak-ng isn't installed, or fails.
    """
    if shutil.which(_PROGRAM) is None:
        raise DataError("generated speech: espeak-ng not found; provide it with `apt-get install espeak-ng`")
    with ThreadPoolExecutor(_PROCESSES) as pool:
        clips = list(pool.map(_spoken, texts, [voices[speaker] for speaker in speakers]))
    columns = {"transcript": texts, "speaker": [f"speaker-{s:02d}" for s in speakers]} | dict(more or {})
    audio = pa.array([{"bytes": clip, "path": None} for clip in clips], _AUDIO_CELL)
    return pa.table({"audio": audio} | {name: pa.array(v, pa.string()) for name, v in columns.items()})


def wav(samples: NDArray[np.int16]) -> bytes:
    """A WAV file of mono samples at `RATE`."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def _sentences(rng: np.random.Generator, count: int) -> list[Sentence]:
    """Different sentences."""
    sentences: dict[Sentence, None] = {}
    makers = (_digits, _command, _colours, _command)
    while len(sentences) < count:
        sentences[makers[len(sentences) % len(makers)](rng)] = None
    return list(sentences)


def _digits(rng: np.random.Generator) -> Sentence:
    return _sentence(rng.choice(_DIGITS, rng.integers(2, 5)), "digits")


def _colours(rng: np.random.Generator) -> Sentence:
    return _sentence(rng.choice(_COLOURS, rng.integers(2, 5)), "colours")


def _command(rng: np.random.Generator) -> Sentence:
    made = command(rng, list(INTENTS)[rng.integers(len(INTENTS))])
    return Sentence(" ".join(made.words), made.intent, " ".join(made.tags))


def _sentence(words: Iterable[str], intent: str) -> Sentence:
    words = [str(word) for word in words]
    return Sentence(" ".join(words), intent, " ".join("O" for _ in words))


def _spoken(text: str, voice: Voice) -> bytes:
    """The text as a WAV file."""
    how = ["-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout"]
    try:
        done = subprocess.run(
            [_PROGRAM, *how, text], capture_output=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"{_PROGRAM} {text!r}: took more than {_PATIENCE_SECONDS} seconds") from None
    if done.returncode != 0 or len(done.stdout) <= _HEADER:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason"])[-1]
        raise DataError(f"{_PROGRAM} -v {voice.name} {text!r}: {last}, expected a WAV file")
    # It can't know its length when it writes the header to a pipe, so that the wave module refuses it.
    rate = int.from_bytes(done.stdout[24:28], "little")
    if rate != _PROGRAM_RATE:
        raise DataError(f"{_PROGRAM} -v {voice.name}: {rate} samples a second, expected {_PROGRAM_RATE}")
    samples = np.frombuffer(done.stdout[_HEADER:], "<i2").astype(np.float64)
    return wav(_resampled(samples))


def _resampled(samples: NDArray[np.float64]) -> NDArray[np.int16]:
    from scipy.signal import resample_poly

    step = int(np.gcd(RATE, _PROGRAM_RATE))
    fewer = resample_poly(samples, RATE // step, _PROGRAM_RATE // step)
    # Band-limited, a loud clip can overshoot: leave it room.
    quieter: NDArray[np.int16] = np.rint(0.8 * fewer).clip(-32_768, 32_767).astype(np.int16)
    return quieter
