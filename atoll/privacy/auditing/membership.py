"""A likelihood-ratio attack on membership, from shadow runs, and what its error rates prove.

Carlini et al. 2022, "Membership Inference Attacks From First Principles" (LiRA): a canary's score in
runs that had it, and in runs that had it not, is taken as Gaussian; the audited run's score is judged
by the ratio of the two densities. All canaries share the deviations, as the paper does with few shadows.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, rankdata

from atoll.privacy.auditing.epsilon_bounds import Membership, Vector

THRESHOLDS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Log-likelihood ratios at which rates are taken, fixed beforehand; either sign is a threshold."""


def log_ratios(scores: Vector, shadows: NDArray[np.float64], inside: NDArray[np.bool_]) -> Vector:
    """Log of the density if in over the density if out, [canaries].

    `shadows` are scores [runs, canaries], `inside` which canaries each of those runs had. A canary
    that no run had, or every one, takes the mean of all canaries for what it lacks.
    """
    mean_in, spread_in = _fit(shadows, inside)
    mean_out, spread_out = _fit(shadows, ~inside)
    with_it = -(((scores - mean_in) / spread_in) ** 2) / 2 - math.log(spread_in)
    without = -(((scores - mean_out) / spread_out) ** 2) / 2 - math.log(spread_out)
    return np.asarray(with_it - without)


def _fit(shadows: NDArray[np.float64], chosen: NDArray[np.bool_]) -> tuple[Vector, float]:
    """(each canary's mean over the chosen runs, the deviation around it that all canaries share)."""
    count = chosen.sum(axis=0)
    values = np.where(chosen, shadows, 0.0)
    overall = float(values.sum() / max(count.sum(), 1))
    means = np.where(count > 0, values.sum(axis=0) / np.maximum(count, 1), overall)
    squares = np.where(chosen, (shadows - means) ** 2, 0.0).sum()
    freedom = max(int(np.maximum(count - 1, 0).sum()), 1)  # a mean of n values takes one of them away
    spread = math.sqrt(float(squares) / freedom)
    return means, max(spread, 1e-12 * max(1.0, float(np.abs(means).max())))


def rate_at(scores: Vector, inside: Membership, false_positives: float) -> float:
    """The part of those inside that is found, where at most that part of those outside is accused."""
    outside = np.sort(scores[~inside])
    allowed = int(false_positives * len(outside))
    if allowed >= len(outside):
        return 1.0
    return float((scores[inside] > outside[len(outside) - 1 - allowed]).mean())


def area(scores: Vector, inside: Membership) -> float:
    """The area under the ROC curve: how often one inside has the higher score of two (Mann and Whitney)."""
    ranks, n = rankdata(scores), int(inside.sum())
    above = float(ranks[inside].sum()) - n * (n + 1) / 2
    return above / (n * (len(scores) - n))


def clopper_pearson(hits: int, trials: int, doubt: float) -> tuple[float, float]:
    """Exact bounds of a probability, each wrong with probability `doubt` at most (1934)."""
    low = 0.0 if hits == 0 else float(beta.ppf(doubt, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - doubt, hits + 1, trials - hits))
    return low, high


def epsilon_of_rates(scores: Vector, inside: Membership, *, delta: float, confidence: float) -> float:
    """The largest epsilon that true over false positives, or negatives, refute; the best threshold's.

    (epsilon, delta)-DP bounds both: TPR <= e^epsilon FPR + delta (Kairouz, Oh, Viswanath 2015). Thresholds
    share the doubt. It takes the canaries of one run for independent trials, which they nearly are.
    """
    values = sorted({sign * t for t in THRESHOLDS for sign in (1, -1)})
    doubt = (1 - confidence) / (4 * len(values))  # two sides of each threshold, two rates each
    largest = 0.0
    for value in values:
        accused = scores > value
        largest = max(largest, _refuted(accused[inside], accused[~inside], delta, doubt))
        largest = max(largest, _refuted(~accused[~inside], ~accused[inside], delta, doubt))
    return largest


def _refuted(rightly: Membership, wrongly: Membership, delta: float, doubt: float) -> float:
    """The epsilon at which the one rate would just be allowed beside the other."""
    often, _ = clopper_pearson(int(rightly.sum()), len(rightly), doubt)
    _, seldom = clopper_pearson(int(wrongly.sum()), len(wrongly), doubt)
    return math.log(max((often - delta) / seldom, 1.0))
