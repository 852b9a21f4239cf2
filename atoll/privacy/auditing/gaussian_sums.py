"""A lower bound on epsilon from how far scores lie apart, for mechanisms that add Gaussian noise.

Guesses throw away by how much a score is above another. Agrawal et al. 2026, "Let's Ask Gauss: Improved
One-Run Privacy Auditing" (arXiv 2606.12733), take a canary's score, summed over the releases, as a
Gaussian if it is in and another if it is out, and epsilon from those two. Here the distance of the two
has a bound that is exact for a finite number of canaries, by Student's two-sample t; what it says of
the noise is turned into epsilon by the accountant, as the f-DP bound does.

What is assumed, and not proven:

- There are as many releases as the family says, and in every canary's direction each adds independent
  Gaussian noise of one deviation.
- A canary that is in is in each release by a coin of its own, at the family's sampling rate. It moves its
  score there by one length at most; its score is the sum over the releases, which are otherwise the same
  whether it is in or not.

Only the noise multiplier, the deviation over that length, is unknown. The bound says nothing of noise
with another distribution: there only `lower_bound` holds, whatever the mechanism is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binom, nct

from atoll.privacy.auditing.epsilon_bounds import (
    LARGEST,
    LEAST_NOISE,
    Family,
    Membership,
    Vector,
    least_noise_refuted,
)

SURE = 1 - 1e-6
"""Confidence of the bound, unless more is asked for.

The attack is as strong as the claim allows: at 95 %, one audit of correct code in twenty would raise an
alarm. So many scores tell their distance so well that the other doubt costs little.
"""
BINS = 64
"""Parts into which the number of times that canaries are in a release is sorted, each rounded up."""
NEGLIGIBLE = 1e-12
"""Probability beyond the outermost of those parts: added to the doubt."""


@dataclass(frozen=True)
class Separation:
    """How far the scores of canaries that are in lie above the others': Student's t and both counts."""

    t: float
    inside: int
    outside: int

    @property
    def degrees_of_freedom(self) -> int:
        """Of the pooled deviation."""
        return self.inside + self.outside - 2

    @property
    def t_per_deviation(self) -> float:
        """What t grows by on average when the means move one deviation apart."""
        return math.sqrt(self.inside * self.outside / (self.inside + self.outside))

    @property
    def deviations(self) -> float:
        """The distance of the two means in pooled deviations."""
        return self.t / self.t_per_deviation


def separation(scores: Vector, inside: Membership) -> Separation:
    """Student's two-sample t with a pooled deviation; infinite where scores don't vary.

    Raises:
        ValueError: fewer than two canaries are in, or fewer than two out.

    >>> separation(np.array([1.0, 3.0, 4.0, 6.0]), np.array([False, False, True, True])).t
    2.1213203435596424
    """
    into, out = scores[inside], scores[~inside]
    if min(len(into), len(out)) < 2:
        raise ValueError(f"expected two canaries in and two out, found {len(into)} in and {len(out)} out")
    unit = Separation(0.0, len(into), len(out))
    apart = float(into.mean() - out.mean())
    squares = float(((into - into.mean()) ** 2).sum() + ((out - out.mean()) ** 2).sum())
    deviation = math.sqrt(squares / unit.degrees_of_freedom)
    t = unit.t_per_deviation * apart / deviation if deviation > 0 else math.copysign(math.inf, apart)
    return Separation(t, len(into), len(out))


def chance(separated: Separation, family: Family, noise_multiplier: float) -> float:
    """How likely the family's member with that noise has scores so far apart, or farther.

    Let those inside be in a release k times together, over n canaries and T releases: then t has the
    noncentral t distribution at k / (n sqrt(T) noise) deviations, and k is binomial. Where sampling makes
    the scores of those inside vary more, the pooled deviation is larger and t smaller: the chance is
    an upper bound, exact without sampling.
    """
    unit = separated.t_per_deviation / (separated.inside * math.sqrt(family.releases) * noise_multiplier)
    times = _times_in_a_release(separated.inside * family.releases, family.sampling_rate)
    tails = nct.sf(separated.t, separated.degrees_of_freedom, unit * np.array(list(times)))
    return float(min(1.0, NEGLIGIBLE + np.dot(tails, list(times.values()))))


def _times_in_a_release(trials: int, rate: float) -> Mapping[int, float]:
    """Binomial counts, rounded up to the end of their bin, with their probabilities."""
    if rate == 1:
        return {trials: 1.0}
    low, high = binom.ppf(NEGLIGIBLE, trials, rate), binom.isf(NEGLIGIBLE, trials, rate)
    ends = np.unique(np.linspace(low, high, BINS).round())
    below = np.concatenate([[0.0], binom.cdf(ends, trials, rate)])
    return dict(zip(ends.astype(int).tolist(), np.diff(below).tolist(), strict=True))


@dataclass(frozen=True)
class SumsFinding:
    """A lower bound on epsilon, and the scores' distance that proves it of Gaussian noise.

    `noise_multiplier` is the largest that isn't refuted at that confidence; None if none is refuted.
    """

    epsilon: float
    noise_multiplier: float | None
    deviations: float
    confidence: float

    def to_json(self) -> dict[str, Any]:
        """For a result; a distance that is infinite has no number there."""
        return {
            "epsilon": self.epsilon,
            "noise_multiplier": self.noise_multiplier,
            "deviations": self.deviations if math.isfinite(self.deviations) else None,
            "confidence": self.confidence,
        }


def lower_bound_by_sums(
    scores: Vector, inside: Membership, family: Family, *, delta: float, confidence: float
) -> SumsFinding:
    """Epsilon of the least noise that the scores' distance refutes; 0 if they refute none.

    Raises:
        ValueError: fewer than two canaries are in, or fewer than two out.
    """
    separated, doubt, most = separation(scores, inside), 1 - confidence, family.most_noise
    if separated.t <= 0 or chance(separated, family, most) >= doubt:
        return SumsFinding(0.0, None, separated.deviations, confidence)
    # The noise at which the distance is what it is on average: it can't be refuted by it.
    usual = math.sqrt(family.releases) * family.sampling_rate / separated.deviations
    least = max(min(usual / 2, most), LEAST_NOISE)
    noise = least_noise_refuted(
        lambda value: chance(separated, family, value) < doubt, least, most, precision=1.001
    )
    return SumsFinding(min(family.epsilon(noise, delta), LARGEST), noise, separated.deviations, confidence)
