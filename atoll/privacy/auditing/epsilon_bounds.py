"""How much privacy a run has lost at least, by what an attacker guessed right about its canaries.

Every canary was in the run or not, by a fair coin of its own. The attacker guesses some of the
coins from what it sees, the surest first. If more guesses are right than (epsilon, delta)-DP
allows, but for a small probability, then epsilon is larger.

- `lower_bound`: Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run",
  the main theorem; holds for any mechanism.
- `lower_bound_in_family`: Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-Differential Privacy in
  One Run", the recursion for a bounded number of guesses; tighter, for it knows the mechanism's whole
  trade-off curve.

Both are for neighbours that differ by adding or removing one unit. A bound proves only that a claim
is false: an attack that finds nothing may be a weak attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from atoll.privacy.accounting import Release, epsilon, profile

Vector = NDArray[np.float64]
Membership = NDArray[np.bool_]

SHARES = (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0)
"""Parts of the canaries that are guessed. The best is taken, and each pays its part of the doubt."""
MIN_GUESSES = 8
"""Guesses below which a share isn't tried: they prove too little for the doubt that they cost."""
LARGEST = 50.0
"""No audit proves more than this epsilon, nor a larger mu: it would take e^50 canaries."""
LEAST_NOISE = 0.02
"""Noise multipliers below this are not told apart: epsilon is above 1,000 there."""


@dataclass(frozen=True)
class Guesses:
    """Of so many canaries, how many were guessed, and how many of those rightly."""

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries:
            raise ValueError(f"expected 0 <= right <= made <= canaries, got {self}")


def guessed(scores: Vector, inside: Membership, made: int) -> Guesses:
    """The surest guesses: half of them that the highest scores are in, half that the lowest are out."""
    order = np.argsort(scores, kind="stable")
    out, into = order[: made // 2], order[len(order) - (made - made // 2) :]
    return Guesses(len(scores), made, int(inside[into].sum() + (~inside[out]).sum()))


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Under (epsilon, delta)-DP, how likely at most so many guesses are right (the main theorem).

    W is binomial, of as many trials as guesses, each right with e^epsilon / (1 + e^epsilon), as for
    randomized response: P[W >= right] + 2 m delta max over i of P[right > W >= right - i] / i.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(guesses.right - 1, guesses.made, chance))
    if guesses.right == 0 or delta == 0:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(guesses.right - 1, -1, -1), guesses.made, chance))
    steepest = float((below / np.arange(1, guesses.right + 1)).max())
    return min(tail + 2 * guesses.canaries * delta * steepest, 1.0)


def lower_bound(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """The largest epsilon that the guesses refute at that confidence; 0 if they refute none."""
    _check(delta, confidence)
    return _largest(lambda value: p_value(guesses, value, delta) < 1 - confidence, LARGEST)


Inverse = Callable[[float], float]
"""x to the y with 1 - f(y) = x: f is a trade-off curve, false negatives over false positives."""


def gaussian_inverse(mu: float) -> Inverse:
    """Of a Gaussian release that is mu-GDP (Dong, Roth, Su 2022): 1 - G_mu(y) = Phi(Phi^-1(y) + mu)."""
    return lambda x: float(ndtr(ndtri(x) - mu))


def profile_inverse(epsilons: Sequence[float], deltas: Sequence[float]) -> Inverse:
    """Of all mechanisms that are (epsilon, delta)-DP for each of those pairs at once.

    Their curve is f(y) = max of 0, 1 - delta - e^epsilon y and e^-epsilon (1 - delta - y) (Wasserman
    and Zhou 2010, Dong, Roth, Su 2022, proposition 2.5): no line of it lies above 1 - x at the answer.
    """
    grow, lost = np.exp(np.asarray(epsilons)), np.asarray(deltas)

    def inverse(x: float) -> float:
        steep, flat = (x - lost) / grow, 1 - lost - (1 - x) * grow
        return max(0.0, float(steep.max()), float(flat.max()))

    return inverse


def refutes(guesses: Guesses, inverse: Inverse, confidence: float) -> bool:
    """Whether f-DP makes so many right guesses less likely than 1 - confidence (by the recursion).

    With tau the probability of at least that many, right[i] and wrong[i] are the chances that one
    canary is guessed rightly or wrongly while at least i are right. They begin at tau right / m and
    tau wrong / m, grow downwards as slowly as f allows, and must end at made / m together.
    """
    doubt, count, made = 1 - confidence, guesses.canaries, guesses.made
    right = doubt * guesses.right / count
    wrong = doubt * (made - guesses.right) / count
    for i in range(guesses.right - 1, -1, -1):
        more = max(wrong, inverse(right))
        right, wrong = right + i / (made - i) * (more - wrong), more
        if right + wrong > made / count:
            return True
    return False


@dataclass(frozen=True)
class Family:
    """Mechanisms that differ in their noise only: so many Gaussian releases at one sampling rate."""

    sampling_rate: float
    releases: int

    @property
    def most_noise(self) -> float:
        """A noise multiplier under which the releases together show next to nothing: mu is 1/200."""
        return 200.0 * math.sqrt(self.releases)

    def curve(self, noise_multiplier: float) -> Inverse:
        """The trade-off curve with that noise: exact without sampling, else a lower bound of it."""
        if self.sampling_rate == 1:
            return gaussian_inverse(math.sqrt(self.releases) / noise_multiplier)
        return _sampled_curve(self, noise_multiplier)

    def epsilon(self, noise_multiplier: float, delta: float) -> float:
        """What the accountant says of that noise."""
        if self.sampling_rate == 1:
            return gaussian_epsilon(math.sqrt(self.releases) / noise_multiplier, delta)
        return epsilon(self.spent(noise_multiplier), delta)

    def spent(self, noise_multiplier: float) -> dict[Release, int]:
        """The releases as a ledger has them."""
        return {Release(noise_multiplier, self.sampling_rate): self.releases}


@lru_cache(maxsize=256)
def _sampled_curve(family: Family, noise_multiplier: float) -> Inverse:
    """Kept, for searches begin at the same noise."""
    epsilons = np.linspace(0, 20, 201).tolist()
    return profile_inverse(epsilons, profile(family.spent(noise_multiplier), epsilons))


GAUSSIAN = Family(1.0, 1)
"""What a mechanism is compared with that has no noise of its own."""


def lower_bound_in_family(guesses: Guesses, family: Family, *, delta: float, confidence: float) -> float:
    """Epsilon of the family's member with the least noise that the guesses refute; 0 if they refute none."""
    _check(delta, confidence)
    most, least = family.most_noise, LEAST_NOISE

    def is_refuted(noise_multiplier: float) -> bool:
        return refutes(guesses, family.curve(noise_multiplier), confidence)

    if 2 * guesses.right <= guesses.made or not is_refuted(most):
        return 0.0
    noise = least_noise_refuted(is_refuted, least, most, precision=1.01)
    return min(family.epsilon(noise, delta), LARGEST)


def least_noise_refuted(
    is_refuted: Callable[[float], bool], least: float, most: float, *, precision: float
) -> float:
    """The least noise multiplier that is refuted, as all larger ones are; `most` must be.

    It is up to `precision` times too large, never too small.
    """
    while most / least > precision:
        middle = math.sqrt(least * most)
        least, most = (least, middle) if is_refuted(middle) else (middle, most)
    return most


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of mu-GDP: the root of Dong, Roth, Su 2022, corollary 2.13."""

    def lost(value: float) -> float:
        far = math.exp(min(value, 700.0)) * ndtr(-value / mu - mu / 2)
        return float(ndtr(-value / mu + mu / 2) - far)

    return _largest(lambda value: lost(value) > delta, 2 * LARGEST**2)


@dataclass(frozen=True)
class Finding:
    """A lower bound on epsilon and the guesses that prove it."""

    epsilon: float
    guesses: Guesses

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        return {"epsilon": self.epsilon, "guesses": self.guesses.made, "right": self.guesses.right}


def best(
    scores: Vector, inside: Membership, bound: Callable[[Guesses, float], float], confidence: float
) -> Finding:
    """The best of several numbers of guesses, chosen after the fact and paid for by Bonferroni.

    `bound` gives the lower bound of guesses at a confidence; the finding holds at `confidence`.
    """
    counts = sorted({max(round(len(scores) * share), min(MIN_GUESSES, len(scores))) for share in SHARES})
    each = 1 - (1 - confidence) / len(counts)
    tried = [guessed(scores, inside, made) for made in counts]
    return max((Finding(bound(g, each), g) for g in tried), key=lambda finding: finding.epsilon)


def _largest(holds: Callable[[float], bool], limit: float) -> float:
    """The largest value, to 1e-6, at which something holds that fails from there on; 0 if it never does."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
        if high > limit:
            return limit
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check(delta: float, confidence: float) -> None:
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
