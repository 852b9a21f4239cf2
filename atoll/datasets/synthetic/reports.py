"""`generated-reports`: reports of what happened in a workshop, and what the log says of each in one line."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.datasets.synthetic.pairs import pairs_by_site
from atoll.protocol.random_streams import stream_seed

_MACHINES = ("press", "saw", "mill", "drill", "crane", "lathe", "oven", "pump")
_TROUBLES = {
    "lost oil": "oil", "got hot": "heat", "made a noise": "noise", "shook": "shaking", "stood still": "stop",
}  # fmt: skip
_DEEDS = {
    "We changed the belt": "new belt", "We cleaned it": "cleaned", "We called the firm": "firm called",
    "We turned it off": "off",
}  # fmt: skip
_ASIDES = (
    "The day was warm.", "Anna was on leave.", "Two orders came in.", "The hall was loud.", "Lunch was late.",
    "Ben wrote this down.",
)  # fmt: skip
_WORKSHOPS = 6
# Below 1: each workshop has mostly a few of the machines.
_TASTE = 0.5


def generated_reports(seed: int = 0, count: int = 4000) -> dict[str, pa.Table]:
    """Different reports: columns source (the report), target (its line in the log) and workshop (of 6).

    A report has three to five sentences. Two of them matter, wherever they stand: which machine had what
    trouble, and what was done. The others are asides, one of them perhaps about a machine that was fine.
    """
    rng = np.random.default_rng(stream_seed(seed, "generated-reports"))
    tastes = rng.dirichlet(np.full(len(_MACHINES), _TASTE), _WORKSHOPS)
    return pairs_by_site("workshop", _WORKSHOPS, count, rng, lambda workshop: _report(rng, tastes[workshop]))


def _report(rng: np.random.Generator, taste: NDArray[np.float64]) -> tuple[str, str]:
    """A report and its line in the log."""
    machine, other = (str(name) for name in rng.choice(_MACHINES, 2, replace=False, p=_all_possible(taste)))
    number = int(rng.integers(1, 10))
    trouble, deed = str(rng.choice(list(_TROUBLES))), str(rng.choice(list(_DEEDS)))
    said = [f"The {machine} {number} {trouble}.", f"{deed}."]
    asides = [str(aside) for aside in rng.choice(_ASIDES, int(rng.integers(1, 3)), replace=False)]
    if rng.integers(2):
        asides.append(f"The {other} ran well.")
    places = sorted(rng.choice(len(said) + len(asides), len(said), replace=False).tolist())
    sentences = list(asides)
    for place, sentence in zip(places, said, strict=True):
        sentences.insert(place, sentence)
    return " ".join(sentences), f"{machine} {number}: {_TROUBLES[trouble]}, {_DEEDS[deed]}"


def _all_possible(taste: NDArray[np.float64]) -> NDArray[np.float64]:
    """The shares of machines with a little of each, so that two different ones can always be drawn."""
    shares: NDArray[np.float64] = (taste + 0.01) / (1 + 0.01 * len(taste))
    return shares
