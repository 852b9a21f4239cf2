"""Lower bounds on a run's epsilon from an attacker's guesses about which canaries were in the run.

Each canary was included in the run with probability 1/2, independently of the others. The attacker guesses
for some canaries whether they were included, starting with those it is surest about. If more guesses are
right than (epsilon, delta)-DP allows except with a small probability, then this epsilon is refuted.

- `lower_bound`: Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run",
  the main theorem; holds for any mechanism.
- `lower_bound_in_family`: Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-Differential Privacy in
  One Run", the recursion for a bounded number of guesses; tighter, because it uses the mechanism's
  whole trade-off curve.

Both are for neighbours that differ by adding or removing one unit. A bound can only refute a claim:
an attack that refutes nothing may simply be weak.
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
"""Fractions of the canaries to guess. The best one is used, with the confidence corrected for choosing it."""
MIN_GUESSES = 8
"""Fractions with fewer guesses than this aren't tried: they prove less than their correction costs."""
LARGEST = 50.0
"""The largest epsilon, and mu, that an audit reports: more would take e^50 canaries."""
LEAST_NOISE = 0.02
"""Noise multipliers below this aren't distinguished: epsilon is above 1,000 there."""


@dataclass(frozen=True)
class Guesses:
    """How many canaries there are, how many guesses were made, and how many of these are right."""

    canaries: int
    made: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.made <= self.canaries:
            raise ValueError(f"expected 0 <= right <= made <= canaries, got {self}")


def guessed(scores: Vector, inside: Membership, made: int) -> Guesses:
    """The result of `made` guesses: half that the highest scores are in, half that the lowest are out.

    `scores` [canaries] and `inside` [canaries], whether each canary was in the run.
    """
    order = np.argsort(scores, kind="stable")
    out, into = order[: made // 2], order[len(order) - (made - made // 2) :]
    return Guesses(len(scores), made, int(inside[into].sum() + (~inside[out]).sum()))


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """An upper bound, under (epsilon, delta)-DP, on the probability of this many right guesses or more.

    The main theorem of Steinke et al. 2023, with m canaries: P[W >= right] + 2 m delta max over i of
    P[right > W >= right - i] / i, where W is binomial with one trial per guess and success probability
    e^epsilon / (1 + e^epsilon), as for randomized response.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(guesses.right - 1, guesses.made, chance))
    if guesses.right == 0 or delta == 0:
        return min(tail, 1.0)
    below = np.cumsum(binom.pmf(np.arange(guesses.right - 1, -1, -1), guesses.made, chance))
    steepest = float((below / np.arange(1, guesses.right + 1)).max())
    return min(tail + 2 * guesses.canaries * delta * steepest, 1.0)


def lower_bound(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """The largest epsilon that the guesses refute at this confidence; 0 if they refute none.

    Raises:
        ValueError: `delta` is not in [0, 1), or `confidence` not in (0, 1).
    """
    _check(delta, confidence)
    return _largest(lambda value: p_value(guesses, value, delta) < 1 - confidence, LARGEST)


Inverse = Callable[[float], float]
"""x to the y with 1 - f(y) = x, where f is a trade-off curve: false negatives by false positives."""


def gaussian_inverse(mu: float) -> Inverse:
    """The inverse for a mu-GDP mechanism: 1 - G_mu(y) = Phi(Phi^-1(y) + mu) (Dong, Roth, Su 2022)."""
    return lambda x: float(ndtr(ndtri(x) - mu))


def profile_inverse(epsilons: Sequence[float], deltas: Sequence[float]) -> Inverse:
    """The inverse for mechanisms that are (epsilon, delta)-DP for each of these pairs at once.

    Their curve is f(y) = max over the pairs of 0, 1 - delta - e^epsilon y and e^-epsilon (1 - delta - y)
    (Wasserman and Zhou 2010; Dong, Roth, Su 2022, proposition 2.5). The result is the smallest y at which
    none of these lines is above 1 - x.
    """
    grow, lost = np.exp(np.asarray(epsilons)), np.asarray(deltas)

    def inverse(x: float) -> float:
        steep, flat = (x - lost) / grow, 1 - lost - (1 - x) * grow
        return max(0.0, float(steep.max()), float(flat.max()))

    return inverse


def refutes(guesses: Guesses, inverse: Inverse, confidence: float) -> bool:
    """Whether this many right guesses are less likely than 1 - confidence under f-DP.

    The recursion of Mahloujifar et al. 2024. Suppose the probability of at least this many right guesses is
    tau = 1 - confidence. For each i, right[i] and wrong[i] are the probabilities that one canary is guessed
    right, or wrong, while at least i guesses are right. They start at tau right / m and tau wrong / m with m
    canaries, and as i decreases they grow at least as fast as f requires. Their sum can't exceed made / m: if
    it does, the supposition is false and the guesses are refuted.
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
    """Mechanisms with `releases` Gaussian releases at one sampling rate, which differ only in their noise."""

    sampling_rate: float
    releases: int

    @property
    def most_noise(self) -> float:
        """A noise multiplier so large that the releases together reveal almost nothing: mu is 1/200."""
        return 200.0 * math.sqrt(self.releases)

    def curve(self, noise_multiplier: float) -> Inverse:
        """The inverse trade-off curve with this noise: exact without sampling, else a lower bound on it."""
        if self.sampling_rate == 1:
            return gaussian_inverse(math.sqrt(self.releases) / noise_multiplier)
        return _sampled_curve(self, noise_multiplier)

    def epsilon(self, noise_multiplier: float, delta: float) -> float:
        """Epsilon at `delta` with this noise: exact without sampling, else by the accountant."""
        if self.sampling_rate == 1:
            return gaussian_epsilon(math.sqrt(self.releases) / noise_multiplier, delta)
        return epsilon(self.spent(noise_multiplier), delta)

    def spent(self, noise_multiplier: float) -> dict[Release, int]:
        """The releases with this noise in a ledger's form: how many of each kind."""
        return {Release(noise_multiplier, self.sampling_rate): self.releases}


@lru_cache(maxsize=256)
def _sampled_curve(family: Family, noise_multiplier: float) -> Inverse:
    """The inverse curve with sampling; cached, because all searches start at the same noise."""
    epsilons = np.linspace(0, 20, 201).tolist()
    return profile_inverse(epsilons, profile(family.spent(noise_multiplier), epsilons))


GAUSSIAN = Family(1.0, 1)
"""A single Gaussian release without sampling, for auditing mechanisms without noise of their own."""


def lower_bound_in_family(guesses: Guesses, family: Family, *, delta: float, confidence: float) -> float:
    """Epsilon of the family's member with the least noise that the guesses refute; 0 if they refute none.

    Raises:
        ValueError: `delta` is not in [0, 1), or `confidence` not in (0, 1).
    """
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
    """The least noise multiplier between `least` and `most` that is refuted, by bisection.

    `is_refuted` must be monotone, and true of `most`. The result is at most `precision` times too large, and
    never too small.
    """
    while most / least > precision:
        middle = math.sqrt(least * most)
        least, most = (least, middle) if is_refuted(middle) else (middle, most)
    return most


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of a mu-GDP mechanism (Dong, Roth, Su 2022, corollary 2.13), to 1e-6."""

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
        """The finding as a table of `result.json`."""
        return {"epsilon": self.epsilon, "guesses": self.guesses.made, "right": self.guesses.right}


def best(
    scores: Vector, inside: Membership, bound: Callable[[Guesses, float], float], confidence: float
) -> Finding:
    """The largest lower bound over several numbers of guesses; it holds at `confidence`.

    `scores` and `inside` are [canaries]. `bound` maps guesses and a confidence to a lower bound on epsilon;
    its confidence has a Bonferroni correction for choosing the best number of guesses afterwards.
    """
    counts = sorted({max(round(len(scores) * share), min(MIN_GUESSES, len(scores))) for share in SHARES})
    each = 1 - (1 - confidence) / len(counts)
    tried = [guessed(scores, inside, made) for made in counts]
    return max((Finding(bound(g, each), g) for g in tried), key=lambda finding: finding.epsilon)


def _largest(holds: Callable[[float], bool], limit: float) -> float:
    """The largest value at which a monotone condition holds, to 1e-6; 0 if it never does, at most `limit`."""
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
