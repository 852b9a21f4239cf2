"""`generated-preferences`: questions, each with an answer that readers prefer and one that they don't."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from atoll.datasets.synthetic.drawing import cut
from atoll.protocol.random_streams import stream_seed

_THINGS = ("book", "car", "door", "hat", "boat", "lamp", "box", "cup", "key", "ball")
_PLACES = ("garden", "kitchen", "library", "station", "office", "market", "hall", "cellar")
_ASKED = ("Where is the {thing}?", "Who has seen the {thing}?", "I can't find the {thing}.")
_POLITE = ("Please look in the {place}.", "It is in the {place}, I think.", "In the {place}, I hope.")
_CURT = ("Look in the {place}!", "In the {place}, as always!", "The {place}. Don't ask me!")
_READERS = 8
# Below 1: each reader asks mostly for a few of the things.
_TASTE = 0.5


def generated_preferences(seed: int = 0, count: int = 600) -> dict[str, pa.Table]:
    """Different pairs: columns prompt, chosen, rejected and reader (of 8 readers, who like it polite).

    Both answers name the same place, so that the manner alone makes one of them the better one.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-preferences"))
    tastes = rng.dirichlet(np.full(len(_THINGS), _TASTE), _READERS)
    pairs: dict[tuple[str, str, str], str] = {}
    while len(pairs) < count:
        reader = int(rng.integers(_READERS))
        thing, place = str(rng.choice(_THINGS, p=tastes[reader])), str(rng.choice(_PLACES))
        question, polite, curt = (str(rng.choice(forms)) for forms in (_ASKED, _POLITE, _CURT))
        row = (question.format(thing=thing), polite.format(place=place), curt.format(place=place))
        pairs.setdefault(row, f"reader-{reader}")
    columns = {
        "prompt": [prompt for prompt, _, _ in pairs],
        "chosen": [chosen for _, chosen, _ in pairs],
        "rejected": [rejected for _, _, rejected in pairs],
        "reader": list(pairs.values()),
    }
    return cut(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}))
