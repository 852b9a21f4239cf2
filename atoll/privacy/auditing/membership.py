"""A likelihood-ratio membership attack with shadow runs, and the epsilon that its error rates refute.

Carlini et al. 2022, "Membership Inference Attacks From First Principles" (LiRA): a canary's score is modelled
as one Gaussian in runs with the canary and another in runs without it; the audited run's score is judged by
the ratio of the two densities. All canaries share the standard deviations, as in the paper with few shadows.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, rankdata

from atoll.privacy.auditing.epsilon_bounds import Membership, Vector

THRESHOLDS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""The log-likelihood ratios used as thresholds, with both signs; they are fixed before the attack."""


def log_ratios(scores: Vector, shadows: NDArray[np.float64], inside: NDArray[np.bool_]) -> Vector:
    """The log of (density if included / density if not) of each canary's score, [canaries].

    `scores` [canaries] are the audited run's, `shadows` [runs, canaries] those of the shadow runs, and
    `inside` [runs, canaries] says which canaries each shadow run had. A canary that was in no shadow run, or
    in all of them, gets the mean over all canaries in place of the missing one.
    """
    mean_in, spread_in = _fit(shadows, inside)
    mean_out, spread_out = _fit(shadows, ~inside)
    with_it = -(((scores - mean_in) / spread_in) ** 2) / 2 - math.log(spread_in)
    without = -(((scores - mean_out) / spread_out) ** 2) / 2 - math.log(spread_out)
    return np.asarray(with_it - without)


def _fit(shadows: NDArray[np.float64], chosen: NDArray[np.bool_]) -> tuple[Vector, float]:
    """(each canary's mean over the chosen runs, the standard deviation around it, shared by all canaries)."""
    count = chosen.sum(axis=0)
    values = np.where(chosen, shadows, 0.0)
    overall = float(values.sum() / max(count.sum(), 1))
    means = np.where(count > 0, values.sum(axis=0) / np.maximum(count, 1), overall)
    squares = np.where(chosen, (shadows - means) ** 2, 0.0).sum()
    freedom = max(int(np.maximum(count - 1, 0).sum()), 1)  # a mean of n values takes one of them away
    spread = math.sqrt(float(squares) / freedom)
    return means, max(spread, 1e-12 * max(1.0, float(np.abs(means).max())))


def rate_at(scores: Vector, inside: Membership, false_positives: float) -> float:
    """The true-positive rate at the lowest threshold with at most this false-positive rate.

    `scores` and `inside` are [canaries].
    """
    outside = np.sort(scores[~inside])
    allowed = int(false_positives * len(outside))
    if allowed >= len(outside):
        return 1.0
    return float((scores[inside] > outside[len(outside) - 1 - allowed]).mean())


def area(scores: Vector, inside: Membership) -> float:
    """The area under the ROC curve: the probability that an included canary has a higher score than another.

    From the Mann-Whitney U statistic; `scores` and `inside` are [canaries].
    """
    ranks, n = rankdata(scores), int(inside.sum())
    above = float(ranks[inside].sum()) - n * (n + 1) / 2
    return above / (n * (len(scores) - n))


def clopper_pearson(hits: int, trials: int, doubt: float) -> tuple[float, float]:
    """(lower, upper) bounds on a probability from `hits` of `trials` (Clopper and Pearson 1934).

    Each bound is wrong with probability at most `doubt`.
    """
    low = 0.0 if hits == 0 else float(beta.ppf(doubt, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - doubt, hits + 1, trials - hits))
    return low, high


def epsilon_of_rates(scores: Vector, inside: Membership, *, delta: float, confidence: float) -> float:
    """The largest epsilon that the rates of true and false positives, or negatives, refute at any threshold.

    (epsilon, delta)-DP implies TPR <= e^epsilon FPR + delta, and the same for negatives (Kairouz, Oh,
    Viswanath 2015). `scores` and `inside` are [canaries]; the confidence is corrected for the number of
    thresholds. The canaries of one run are treated as independent trials, which is nearly true.
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
    """The largest epsilon refuted by the rate of right accusations against the rate of wrong ones."""
    often, _ = clopper_pearson(int(rightly.sum()), len(rightly), doubt)
    _, seldom = clopper_pearson(int(wrongly.sum()), len(wrongly), doubt)
    return math.log(max((often - delta) / seldom, 1.0))
