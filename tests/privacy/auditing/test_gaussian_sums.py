"""The bound from how far scores lie apart: exact for Gaussian scores, and valid for sampled ones."""

import math

import numpy as np
import pytest
from scipy.stats import binom, chi, norm, ttest_ind

from atoll.privacy.accounting import calibrate
from atoll.privacy.auditing.epsilon_bounds import LARGEST, Family, Membership, Vector, gaussian_epsilon
from atoll.privacy.auditing.gaussian_sums import (
    BINS,
    SURE,
    Separation,
    SumsFinding,
    _times_in_a_release,
    chance,
    lower_bound_by_sums,
    separation,
)

DELTA = 1e-5
RUNS = 300
MOST_ERRORS = 33
"""Of 300 runs at 95 %: 15 are expected, and five deviations are 18.9."""


def simulated(
    family: Family, noise: float, canaries: int, generator: np.random.Generator
) -> tuple[Vector, Membership]:
    """Scores of an exact member of the family: lengths of 1 in sampled releases, and their noise."""
    inside = generator.random(canaries) < 0.5
    times = generator.binomial(family.releases, family.sampling_rate, canaries)
    noises = noise * math.sqrt(family.releases) * generator.standard_normal(canaries)
    return inside * times + noises, inside


def proven(family: Family, noise: float, seed: int, *, confidence: float = SURE) -> SumsFinding:
    scores, inside = simulated(family, noise, 2000, np.random.default_rng(seed))
    return lower_bound_by_sums(scores, inside, family, delta=DELTA, confidence=confidence)


def test_the_separation_is_students() -> None:
    scores, inside = simulated(Family(1.0, 1), 1.0, 50, np.random.default_rng(1))
    found, expected = separation(scores, inside), ttest_ind(scores[inside], scores[~inside])
    assert found.t == pytest.approx(expected.statistic)
    assert found.degrees_of_freedom == expected.df == 48
    # Means of 1 and 4 with deviations of 1 and 1 around them, by hand: 3 deviations over sqrt(2 / 2).
    by_hand = separation(np.array([0.0, 2.0, 3.0, 5.0]), np.array([False, False, True, True]))
    assert chance(Separation(-100.0, 50, 50), Family(0.5, 4), 1.0) == 1.0
    assert (by_hand.t, by_hand.deviations) == (
        pytest.approx(3 / math.sqrt(2)),
        pytest.approx(3 / math.sqrt(2)),
    )


@pytest.mark.parametrize("deviations", [0.5, 1.7])
@pytest.mark.parametrize("above", [0.0, 2.0, 4.75])
def test_without_sampling_the_chance_is_the_integral_over_the_deviation(
    deviations: float, above: float
) -> None:
    """P[t] is that of a normal mean over a chi deviation: its quantiles' midpoints, one by one."""
    found = Separation(deviations * math.sqrt(250) + above, 500, 500)
    spread = chi.ppf((np.arange(100_000) + 0.5) / 100_000, 998) / math.sqrt(998)
    slow = float(norm.sf(found.t * spread - deviations * math.sqrt(250)).mean())
    # Four releases with a noise of 2 / deviations move the mean as many deviations.
    assert chance(found, Family(1.0, 4), 2 / deviations) == pytest.approx(slow, rel=5e-3)


def test_how_often_canaries_are_sampled_is_binomial_but_for_rounding_up() -> None:
    exact = binom(500, 0.25)
    found = _times_in_a_release(500, 0.25)
    assert len(found) <= BINS
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-11)
    reached = 0.0
    for times, probability in found.items():
        reached += probability
        assert reached == pytest.approx(exact.cdf(times), abs=1e-12)  # nobody counts as less often
    mean = sum(times * probability for times, probability in found.items())
    assert 125 <= mean < 125 + 0.2 * exact.std()
    assert _times_in_a_release(500, 1.0) == {500: 1.0}


def test_the_bound_is_wrong_as_often_as_it_says_where_scores_are_gaussian() -> None:
    """mu = 1.66 has epsilon 8 at a delta of 1e-5; at 95 % the bound is above it in 5 % of the runs."""
    mu, truth = 1.66, gaussian_epsilon(1.66, DELTA)
    found = [proven(Family(1.0, 1), 1 / mu, seed, confidence=0.95).epsilon for seed in range(RUNS)]
    above = sum(value > truth for value in found)
    assert 1 <= above <= MOST_ERRORS
    assert np.median(found) > 0.9 * truth


@pytest.mark.parametrize(
    ("rate", "releases", "noise"), [(0.25, 100, 1.7), (0.1, 10, 0.4), (0.5, 1, 0.5), (0.02, 1, 0.3)]
)
def test_sampled_mechanisms_are_seldom_refuted(rate: float, releases: int, noise: float) -> None:
    """Also with few coins, where they alone move the means, and scores are far from Gaussian."""
    family, generator = Family(rate, releases), np.random.default_rng(7)
    chances = [
        chance(separation(*simulated(family, noise, 400, generator)), family, noise) for _ in range(RUNS)
    ]
    assert sum(value < 0.05 for value in chances) <= MOST_ERRORS


def test_canaries_that_a_mechanism_mutes_prove_less() -> None:
    """Half of the canaries have no part in any release: nothing above the truth is proven."""
    family, generator = Family(1.0, 4), np.random.default_rng(9)
    truth = family.epsilon(1.2, DELTA)
    for _ in range(20):
        scores, inside = simulated(family, 1.2, 2000, generator)
        muted = scores - 4 * inside * (generator.random(2000) < 0.5)
        found = lower_bound_by_sums(muted, inside, family, delta=DELTA, confidence=SURE)
        assert 0 < found.epsilon < 0.6 * truth


@pytest.mark.parametrize(("rate", "releases"), [(1.0, 20), (0.25, 100)])
def test_at_epsilon_8_most_of_the_claim_is_proven_and_less_noise_is_not_hidden(
    rate: float, releases: int
) -> None:
    family = Family(rate, releases)
    noise = calibrate(8.0, delta=DELTA, sampling_rate=rate, releases=releases)
    for seed in range(3):
        assert 0.6 * 8 < proven(family, noise, seed).epsilon < 8
    scores, inside = simulated(family, noise / 4, 2000, np.random.default_rng(3))
    assert lower_bound_by_sums(scores, inside, family, delta=DELTA, confidence=SURE).epsilon > 16
    if rate < 1:  # everybody is in every release, and a quarter of them was charged for
        scores, inside = simulated(Family(1.0, releases), noise, 2000, np.random.default_rng(4))
        assert lower_bound_by_sums(scores, inside, family, delta=DELTA, confidence=SURE).epsilon > 16


def test_more_confidence_proves_less_and_says_so() -> None:
    found = [proven(Family(1.0, 1), 0.6, 5, confidence=c) for c in (0.5, 0.95, SURE)]
    assert found[0].epsilon > found[1].epsilon > found[2].epsilon > 0
    written = found[2].to_json()
    assert (written["epsilon"], written["confidence"]) == (found[2].epsilon, SURE)
    assert written["noise_multiplier"] > 0.6 and written["deviations"] == pytest.approx(1 / 0.6, abs=0.3)


def test_what_shows_nothing_proves_nothing_and_what_shows_all_a_finite_epsilon() -> None:
    inside = np.arange(100) % 2 == 0
    noise = np.random.default_rng(6).standard_normal(100)
    for scores in (noise, noise - 5.0 * inside):
        found = lower_bound_by_sums(scores, inside, Family(1.0, 1), delta=DELTA, confidence=SURE)
        assert (found.epsilon, found.noise_multiplier) == (0.0, None)
    # Also at a confidence at which the bound is wrong more often than not.
    wrong_way = lower_bound_by_sums(noise - inside, inside, Family(1.0, 1), delta=DELTA, confidence=0.3)
    assert (wrong_way.epsilon, wrong_way.noise_multiplier) == (0.0, None)
    equal = np.array([1.0, 2.0, 1.0, 2.0]), np.array([True, True, False, False])
    nothing = lower_bound_by_sums(*equal, Family(1.0, 1), delta=DELTA, confidence=0.3)
    assert (nothing.epsilon, nothing.noise_multiplier, nothing.deviations) == (0.0, None, 0.0)
    little = lower_bound_by_sums(
        np.array([1.0, 2.0, 1.6, 2.6]), ~equal[1], Family(1.0, 1), delta=DELTA, confidence=0.5
    )
    assert little.deviations == pytest.approx(0.6 / math.sqrt(0.5)) and little.epsilon > 0
    plain = lower_bound_by_sums(inside.astype(float), inside, Family(1.0, 1), delta=DELTA, confidence=SURE)
    assert plain.epsilon == LARGEST and plain.to_json()["deviations"] is None
    with pytest.raises(ValueError, match="found 1 in and 2 out"):
        separation(np.arange(3.0), np.array([True, False, False]))
