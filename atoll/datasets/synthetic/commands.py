"""`generated-commands`: what people tell a voice assistant, with intent and slots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import cut
from atoll.protocol.random_streams import stream_seed

SLOTS = {
    "room": (
        "kitchen", "bathroom", "bedroom", "living room", "hall", "dining room", "garage", "office", "attic",
        "guest room",
    ),
    "degrees": ("eighteen", "nineteen", "twenty", "twenty one", "twenty two", "twenty three", "sixteen"),
    "music": ("jazz", "rock", "folk", "classical music", "piano music", "the news", "old songs", "hip hop"),
    "duration": (
        "five minutes", "ten minutes", "twenty minutes", "one hour", "two hours", "half an hour",
        "thirty seconds", "forty five minutes",
    ),
    "place": (
        "london", "the station", "new york", "the airport", "berlin", "the harbour", "oslo", "san francisco",
        "madrid", "the old town",
    ),
    "contact": ("anna", "doctor brown", "ben", "my mother", "the office", "uncle joe", "emma", "aunt rose"),
}  # fmt: skip
INTENTS = {
    "light_on": ("turn on the light in the {room}", "light up the {room}", "{room} lights on"),
    "light_off": ("turn off the light in the {room}", "make the {room} dark", "{room} lights off"),
    "heat": ("set the {room} to {degrees} degrees", "heat the {room} to {degrees}", "{degrees} degrees"),
    "play": ("play {music}", "play {music} in the {room}", "i want to hear {music}"),
    "timer": ("set a timer for {duration}", "wake me in {duration}", "count down {duration}"),
    "weather": ("what is the weather in {place}", "will it rain in {place}", "how cold is {place}"),
    "call": ("call {contact}", "ring {contact} in {duration}", "phone {contact} at {place}"),
    "navigate": ("drive to {place}", "take me to {place} in {duration}", "show the way to {place}"),
}
_BEFORE = ("", "please ", "hey ", "now ", "could you ", "okay ", "quickly ", "would you ", "hello ", "and ")
_AFTER = ("", " please", " now", " for me", " again", " thanks", " today", " tonight")
_SPEAKERS = 20
# Below 1: each speaker wants a few things mostly.
_TASTE = 0.7


@dataclass(frozen=True)
class Command:
    """A sentence, what is meant by it, and a BIO tag for each of its words."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    intent: str


def generated_commands(seed: int = 0, count: int = 2000) -> dict[str, pa.Table]:
    """Different sentences: columns text, intent, slots (BIO tags, one a word) and speaker.

    A speaker has manners, words before and after the command, and favourite intents.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-commands"))
    names = list(INTENTS)
    tastes = rng.dirichlet(np.full(len(names), _TASTE), _SPEAKERS)
    manners = [(rng.choice(_BEFORE, 3), rng.choice(_AFTER, 3)) for _ in range(_SPEAKERS)]
    rows: dict[str, list[str]] = {"text": [], "intent": [], "slots": [], "speaker": []}
    seen: set[tuple[str, ...]] = set()
    while len(seen) < count:
        speaker = int(rng.integers(_SPEAKERS))
        before, after = (str(rng.choice(manner)) for manner in manners[speaker])
        made = command(rng, str(rng.choice(names, p=tastes[speaker])), before=before, after=after)
        if made.words not in seen:
            seen.add(made.words)
            values = (" ".join(made.words), made.intent, " ".join(made.tags), f"speaker-{speaker:02d}")
            for column, value in zip(rows, values, strict=True):
                rows[column].append(value)
    return cut(pa.table({column: pa.array(values, pa.string()) for column, values in rows.items()}))


def command(rng: np.random.Generator, intent: str, *, before: str = "", after: str = "") -> Command:
    """A command with that intent, in one of its forms, about things drawn at random."""
    forms = INTENTS[intent]
    words: list[str] = []
    tags: list[str] = []
    for part in (before + forms[rng.integers(len(forms))] + after).split():
        slot = part[1:-1] if part.startswith("{") else None
        values = SLOTS[slot] if slot else (part,)
        value = values[rng.integers(len(values))].split()
        words += value
        tags += [f"{'I' if place else 'B'}-{slot}" if slot else "O" for place in range(len(value))]
    return Command(tuple(words), tuple(tags), intent)


def command_words() -> set[str]:
    """Every word that a command may have."""
    text = " ".join((*(form for forms in INTENTS.values() for form in forms), *_BEFORE, *_AFTER))
    values = " ".join(value for values in SLOTS.values() for value in values)
    return {word for word in f"{text} {values}".split() if not word.startswith("{")}
