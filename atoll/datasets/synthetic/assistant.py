"""`generated-assistant`: what people tell a voice assistant, aloud."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.commands import INTENTS, Command, command
from atoll.datasets.synthetic.drawing import cut
from atoll.datasets.synthetic.speech import VOICES, recordings
from atoll.protocol.random_streams import stream_seed

_SPEAKERS = 6
_POLITE = ("", "", "please ", "hey ", "could you ")


def generated_assistant(seed: int = 0, count: int = 720) -> dict[str, pa.Table]:
    """Commands in 6 voices: columns audio (16 kHz mono 16-bit WAV), transcript, speaker, intent, slots.

    Different sentences, so that none of the test split is in the training split; all speakers are in both.

    Raises:
        DataError: espeak-ng isn't installed, or fails.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-assistant"))
    commands: dict[tuple[str, ...], Command] = {}
    while len(commands) < count:
        before = _POLITE[rng.integers(len(_POLITE))]
        made = command(rng, list(INTENTS)[rng.integers(len(INTENTS))], before=before)
        commands.setdefault(made.words, made)
    speakers = [int(speaker) for speaker in rng.integers(0, _SPEAKERS, count)]
    more = {
        "intent": [made.intent for made in commands.values()],
        "slots": [" ".join(made.tags) for made in commands.values()],
    }
    return cut(recordings([" ".join(words) for words in commands], speakers, VOICES, more))
