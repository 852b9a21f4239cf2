"""Whether runs that differ in their seed alone end in two groups far apart, for which a mean stands badly.

Sorted results are cut in two where that leaves least variance within the parts. They count as two groups
where

    the variance within them is at most a twentieth of the whole variance, and
    their means are a tenth of the larger one's size apart or more,

and there are five results at least. Of ten draws from one normal distribution less than one in 500 look so,
of five one in 14, before the second condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

FEWEST = 5
"""Results that can be told to be two groups."""
WITHIN = 0.05
"""Of the whole variance, at most within the groups."""
APART = 0.1
"""Of the larger mean's size, at least between the groups' means."""


@dataclass(frozen=True)
class Modes:
    """Two groups of results, the lower one first: how many they are, and their means."""

    counts: tuple[int, int]
    means: tuple[float, float]

    @property
    def description(self) -> str:
        """What stands beside a mean that says little.

        >>> Modes((1, 4), (0.41, 0.815)).description
        'seeds end far apart: 1 near 0.410, 4 near 0.815'
        """
        near = ", ".join(f"{n} near {mean:.3f}" for n, mean in zip(self.counts, self.means, strict=True))
        return f"seeds end far apart: {near}"


def modes_of(values: Sequence[float]) -> Modes | None:
    """The two groups in which results end, or None where they are one.

    >>> modes_of([0.81, 0.41, 0.82, 0.82, 0.81]).counts  # published: FedAvg on Fed-TCGA-BRCA
    (1, 4)
    >>> modes_of([0.81, 0.79, 0.82, 0.83, 0.80]) is None
    True
    """
    if len(values) < FEWEST:
        return None
    ordered = sorted(values)
    cuts = [(ordered[:place], ordered[place:]) for place in range(1, len(ordered))]
    low, high = min(cuts, key=lambda parts: sum(map(_squares, parts)))
    below, above = fmean(low), fmean(high)
    apart = above - below
    if apart <= 0 or apart < APART * max(abs(below), abs(above)):
        return None
    if _squares(low) + _squares(high) > WITHIN * _squares(ordered):
        return None
    return Modes((len(low), len(high)), (below, above))


def remark_on(name: str, values: Sequence[float]) -> str | None:
    """A line about what is called `name`, where its seeds end in two groups."""
    modes = modes_of(values)
    return None if modes is None else f"{name}: {modes.description}; the mean stands for neither."


def _squares(values: Sequence[float]) -> float:
    """The sum of squared differences from the mean."""
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)
