"""Adaptive clipping: it finds the quantile from both sides, and costs what it says."""

import numpy as np
import pytest

from atoll.privacy.adaptive_clipping import multiplier_of_sum, noised_fraction, update_clipping_norm


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_where_all_norms_are_one_the_clipping_norm_is_one_within_60_rounds(start: float) -> None:
    norm, last = start, []
    for round in range(80):
        within = 100 if norm >= 1 else 0
        fraction = noised_fraction(within, 100, noise=0.0, expected_cohort=100)
        norm = update_clipping_norm(norm, fraction, quantile=0.5, lr=0.1)
        if round >= 59:
            last.append(norm)
    assert all(abs(value - 1) <= 0.05 for value in last)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_it_follows_a_quantile_through_the_noise(quantile: float) -> None:
    rng = np.random.default_rng(0)
    norm, tail = 5.0, []
    for round in range(600):
        norms = rng.lognormal(0.0, 0.5, 200)
        fraction = noised_fraction(
            int((norms <= norm).sum()), 200, noise=rng.normal(0, 10), expected_cohort=200
        )
        norm = update_clipping_norm(norm, fraction, quantile=quantile, lr=0.1)
        if round >= 300:
            tail.append(norm)
    expected = np.exp(0.5 * {0.1: -1.2816, 0.5: 0.0, 0.9: 1.2816}[quantile])
    assert np.mean(tail) == pytest.approx(expected, rel=0.05)


def test_both_releases_together_cost_one_of_the_stated_multiplier() -> None:
    # Two Gaussian releases compose as 1/z^2 = 1/z_sum^2 + 1/z_count^2; the count's sensitivity is 1/2.
    left = multiplier_of_sum(1.0, 5.0)
    assert left**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0)
    assert left > 1.0


def test_a_count_that_costs_more_than_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"count_deviation must be > noise_multiplier / 2 = 0\.5, got 0\.5"):
        multiplier_of_sum(1.0, 0.5)


def test_one_client_moves_the_count_by_a_half_whatever_it_says() -> None:
    base = noised_fraction(30, 60, noise=0.0, expected_cohort=100)
    for within in (0, 1):
        moved = noised_fraction(30 + within, 61, noise=0.0, expected_cohort=100)
        assert abs(moved - base) * 100 == pytest.approx(0.5)


def test_a_fraction_is_the_reports_sum_with_its_noise_over_the_expected_cohort() -> None:
    assert noised_fraction(3, 4, noise=0.5, expected_cohort=8.0) == (3 - 2 + 0.5) / 8 + 0.5
    assert noised_fraction(0, 0, noise=0.0, expected_cohort=8.0) == 0.5


@pytest.mark.parametrize(("fraction", "counts_as"), [(-3.0, 0.0), (0.25, 0.25), (1.7, 1.0)])
def test_a_fraction_beyond_its_range_counts_as_its_end(fraction: float, counts_as: float) -> None:
    norm = update_clipping_norm(2.0, fraction, quantile=0.5, lr=0.2)
    assert norm == pytest.approx(2 * np.exp(-0.2 * (counts_as - 0.5)), rel=1e-12)
