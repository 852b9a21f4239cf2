"""The privacy cost of a discrete Gaussian on a grid, bounded by that of slightly smaller continuous noise.

One number. Canonne, Kamath and Steinke 2020 (arXiv 2004.00010, theorem 7) give the exact delta of each
epsilon: P[X > a - D/2] - exp(epsilon) P[X > a + D/2] with a = epsilon variance / D, for a sensitivity of D
grid steps. It isn't always below the continuous Gaussian's: at 8 steps to a deviation delta is up to
2.6e-4 more, at 64 up to 4e-6, at 512 up to 6e-8 (tests/privacy/test_discrete_accounting.py). Nor is one
number enough, for the lattice isn't invariant under rotation: neighbours that differ by (3, 4) and by (5, 0)
have different curves. For vectors their theorem 14 bounds concentrated privacy only, whose epsilon is looser
than that of the continuous Gaussian's privacy loss distribution (PLD).

What holds for vectors, sampling and composition alike: a discrete Gaussian is all but exactly what
follows by processing a continuous one. Let y be a real number from N(mean, variance - r^2), and draw a
whole number x with probability proportional to exp(-(x - y)^2 / 2r^2): this needs y only. By Poisson's
summation formula the sum of exp(-(k - y)^2 / 2r^2) over all whole k is r sqrt(2 pi) (1 + s), where |s| is
at most t = 2 (q + q^4 + q^9 + ...) with q = exp(-2 pi^2 r^2), whatever y is. Thus x has the density of
the two continuous Gaussians' sum, N(mean, variance) at x, times a factor between 1 / (1 + t) and
1 / (1 - t); the discrete Gaussian with a whole mean has it times one between 1 / (1 + t) and 1. (So lattices
convolve: Peikert 2010, "An Efficient and Parallel Gaussian Sampler for Lattices", theorem 3.1.)
For each number released the logarithm of the probabilities' ratio is log((1 + t) / (1 - t)) at
most; over everything that a run releases, whichever units were sampled and however later rounds depend on
earlier ones, these add up to `slack`, for the inequality holds for every outcome and every data set.
If the run with continuous noise is (epsilon, delta)-private, then that with discrete noise is
(epsilon + 2 slack, exp(slack) delta)-private. r is a few grid steps and q falls with exp(-20 r^2), so
that both prices are tiny: the deviation loses r^2 / 2 variance of itself, and slack is below 1e-30.

    grid steps to a deviation     2^6      2^10     2^20     2^28
    r^2 for 1e12 numbers          5.0      5.0      5.0      5.0
    deviation lost, as a part     6e-4     2.4e-6   2.3e-12  3.5e-17

It is assumed that sums are whole numbers of steps, with the sensitivity that they have after rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from atoll.privacy.accounting import Composition, Relation, Release, epsilon

SLACK = 1e-30
"""The largest slack where noise isn't drawn in shares; epsilon grows by at most twice this."""


@dataclass(frozen=True)
class Excess:
    """A bound on how much more discrete noise costs in privacy than continuous noise of the same variance."""

    noise_factor: float
    """Continuous noise of this part of the deviation costs at least as much, up to the slack."""
    slack: float
    """Epsilon grows by twice this, and delta by a factor of its exponential."""


def discrete_excess(variance: Fraction, numbers: int, shares: int = 1) -> Excess:
    """The excess cost of a run that releases `numbers` numbers in all, each with discrete Gaussian noise.

    `variance` is the least of any release, in squared grid steps. With `shares`, each number's noise is the
    sum of `shares` independent discrete Gaussians, each of this variance, as in a secure sum.

    Raises:
        ValueError: there are no numbers or shares, or the grid is too coarse for the bound to say much.
    """
    if numbers < 1 or shares < 1:
        raise ValueError(f"numbers and shares must be >= 1, got {numbers} and {shares}")
    total = float(variance * shares)
    # t is all but SLACK / (4 numbers), and log((1 + t) / (1 - t)) twice that: half of what is claimed.
    smoothing = math.log(8 * numbers / SLACK) / (2 * math.pi**2)
    if total < 2 * smoothing:
        raise ValueError(f"variance must be >= {2 * smoothing:.1f} squared grid steps, got {total}")
    factor = math.nextafter(math.sqrt(1 - smoothing / total), 0.0)
    return Excess(factor, SLACK + numbers * sum_deviation(variance, shares))


def sum_deviation(variance: Fraction, shares: int) -> float:
    """The largest log ratio between a sum of discrete Gaussians and the one of the summed variance.

    `variance` is each share's, in squared grid steps. Kairouz, Liu and Steinke 2021, "The Distributed
    Discrete Gaussian Mechanism" (arXiv 2102.06387), section 4: 5 times the sum of
    exp(-2 pi^2 variance k / (k + 1)) over k = 1, ..., shares - 1. It is below 1e-80 from a
    variance of 20 on.

    Raises:
        ValueError: the variance is below 1/4, for which they prove nothing.
    """
    if shares > 1 and variance < Fraction(1, 4):
        raise ValueError(f"a share's variance must be >= 1/4 squared grid steps, got {variance}")
    rate = -2 * math.pi**2 * float(variance)
    return 5 * math.fsum(math.exp(rate * k / (k + 1)) for k in range(1, shares))


def discrete_epsilon(
    spent: Composition, delta: float, excess: Excess, relation: Relation = "add-or-remove-one"
) -> float:
    """Epsilon of releases whose noise was discrete: an upper bound, by the continuous Gaussian's PLD.

    Raises:
        ValueError: delta is not in (0, 1).
    """
    continuous: dict[Release, int] = {}
    for release, count in spent.items():
        less = replace(release, noise_multiplier=release.noise_multiplier * excess.noise_factor)
        continuous[less] = continuous.get(less, 0) + count
    return epsilon(continuous, delta * math.exp(-excess.slack), relation) + 2 * excess.slack
