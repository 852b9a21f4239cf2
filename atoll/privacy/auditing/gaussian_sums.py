"""A lower bound on epsilon from the distance between canaries' scores, for mechanisms with Gaussian noise.

Guesses use only the order of scores, not their distances. Agrawal et al. 2026, "Let's Ask Gauss: Improved
One-Run Privacy Auditing" (arXiv 2606.12733), model a canary's score, summed over the releases, as one
Gaussian if the canary was included and another if it wasn't, and compute epsilon from the two. Here the
distance of the two means is bounded exactly for a finite number of canaries, by Student's two-sample t; the
resulting bound on the noise is converted into epsilon by the accountant, as in `lower_bound_in_family`.

What is assumed, and not proven:

- There are as many releases as the family says, and in every canary's direction each release adds
  independent Gaussian noise of the same standard deviation.
- An included canary is in each release independently, with the family's sampling rate as probability. There
  it moves its score by at most one unit of length; its score is the sum over the releases, which are
  otherwise the same whether it is included or not.

Only the noise multiplier, the standard deviation over that length, is unknown. The bound doesn't hold for
noise of another distribution: there only `lower_bound` does, which holds for any mechanism.
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
"""The bound's confidence, unless a higher one is asked for.

The attack is as strong as the claim allows, so at 95 % one audit of correct code in twenty would raise an
alarm. With this many scores their distance is known so well that a higher confidence costs little.
"""
BINS = 64
"""The number of bins for how often canaries are in a release; counts are rounded up to their bin's end."""
NEGLIGIBLE = 1e-12
"""The probability outside of the bins, which is added to the tail probability."""


@dataclass(frozen=True)
class Separation:
    """Student's t between the scores of included canaries and those of the others, and both counts."""

    t: float
    inside: int
    outside: int

    @property
    def degrees_of_freedom(self) -> int:
        """The degrees of freedom of the pooled standard deviation."""
        return self.inside + self.outside - 2

    @property
    def t_per_deviation(self) -> float:
        """The increase of t per standard deviation between the two means."""
        return math.sqrt(self.inside * self.outside / (self.inside + self.outside))

    @property
    def deviations(self) -> float:
        """The distance of the two means in pooled standard deviations."""
        return self.t / self.t_per_deviation


def separation(scores: Vector, inside: Membership) -> Separation:
    """Student's two-sample t with a pooled standard deviation; infinite if scores don't vary.

    `scores` and `inside` are [canaries].

    Raises:
        ValueError: fewer than two canaries are included, or fewer than two are not.

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
    """The probability that the family's member with this noise separates scores this far or farther.

    Let the n included canaries be in a release k times in total, over T releases. Then t has the noncentral t
    distribution for means k / (n sqrt(T) noise) standard deviations apart, and k is binomial. Sampling also
    makes the included canaries' scores vary more, which makes t smaller; so the result is an upper bound, and
    exact without sampling.
    """
    unit = separated.t_per_deviation / (separated.inside * math.sqrt(family.releases) * noise_multiplier)
    times = _times_in_a_release(separated.inside * family.releases, family.sampling_rate)
    tails = nct.sf(separated.t, separated.degrees_of_freedom, unit * np.array(list(times)))
    return float(min(1.0, NEGLIGIBLE + np.dot(tails, list(times.values()))))


def _times_in_a_release(trials: int, rate: float) -> Mapping[int, float]:
    """The probability of each binomial count, where counts are rounded up to the end of their bin."""
    if rate == 1:
        return {trials: 1.0}
    low, high = binom.ppf(NEGLIGIBLE, trials, rate), binom.isf(NEGLIGIBLE, trials, rate)
    ends = np.unique(np.linspace(low, high, BINS).round())
    below = np.concatenate([[0.0], binom.cdf(ends, trials, rate)])
    return dict(zip(ends.astype(int).tolist(), np.diff(below).tolist(), strict=True))


@dataclass(frozen=True)
class SumsFinding:
    """A lower bound on epsilon for Gaussian noise, and the scores' distance that proves it.

    `noise_multiplier` is the least that is refuted at this confidence; None if none is.
    """

    epsilon: float
    noise_multiplier: float | None
    deviations: float
    confidence: float

    def to_json(self) -> dict[str, Any]:
        """The finding as a table of `result.json`; an infinite distance is written as null."""
        return {
            "epsilon": self.epsilon,
            "noise_multiplier": self.noise_multiplier,
            "deviations": self.deviations if math.isfinite(self.deviations) else None,
            "confidence": self.confidence,
        }


def lower_bound_by_sums(
    scores: Vector, inside: Membership, family: Family, *, delta: float, confidence: float
) -> SumsFinding:
    """Epsilon of the family's member with the least noise that the scores' distance refutes; 0 without one.

    Raises:
        ValueError: fewer than two canaries are included, or fewer than two are not.
    """
    separated, doubt, most = separation(scores, inside), 1 - confidence, family.most_noise
    if separated.t <= 0 or chance(separated, family, most) >= doubt:
        return SumsFinding(0.0, None, separated.deviations, confidence)
    # With this noise the observed distance is the expected one, so this noise can't be refuted.
    usual = math.sqrt(family.releases) * family.sampling_rate / separated.deviations
    least = max(min(usual / 2, most), LEAST_NOISE)
    noise = least_noise_refuted(
        lambda value: chance(separated, family, value) < doubt, least, most, precision=1.001
    )
    return SumsFinding(min(family.epsilon(noise, delta), LARGEST), noise, separated.deviations, confidence)
