"""Epsilon against published and independently computed figures, and what it must never do."""

import math
import os
from bisect import bisect_left
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import ndtr

from atoll.privacy import accounting
from atoll.privacy.accounting import (
    GRIDS,
    LEAST_NOISE,
    PRECISION,
    Release,
    _narrowed,
    _refined,
    _sane,
    _suffices,
    calibrate,
    compose,
    epsilon,
    epsilon_rdp,
    profile,
    within,
)

TABLE = [
    # noise multiplier, sampling rate, releases, delta, epsilon by PLD on a refined grid
    (1.0, 0.01, 1000, 1e-5, 1.82824),
    (1.1, 256 / 60000, 14062, 1e-5, 2.38169),
    (0.8, 0.1, 100, 1e-5, 10.97638),
    (1.0, 1, 1, 1e-5, 4.37718),
    (1.0, 1, 100, 1e-5, 91.81729),
    (4.0, 0.5, 300, 1e-5, 11.27863),
    (1.0, 0.1, 100, 1e-3, 4.78435),
    (1.0, 0.1, 100, 1e-5, 7.04660),
    (1.5, 0.04, 2250, 1e-5, 6.7688),
    (0.5, 0.01, 1000, 1e-5, 13.3608),
    (1, 1e-5, 100_000, 1e-6, 0.01313),
    (1, 0.5, 1, 0.5, 0),
    (1.0, 1, 100, 1e-3, 80.0325),
    (1.0, 0.1, 50, 1e-2, 2.2501),
    (5.0, 1, 50, 1e-2, 3.7075),
    (0.8, 0.02, 500, 1e-5, 4.6680),
]

IS_MATRIX = os.environ.get("ATOLL_TEST_PROFILE") == "matrix"
"""Whether there is time for many examples, and for those with little noise and many releases."""


@pytest.mark.parametrize(("noise", "rate", "releases", "delta", "expected"), TABLE)
def test_epsilon_is_never_below_the_truth_and_hardly_above(
    noise: float, rate: float, releases: int, delta: float, expected: float
) -> None:
    found = epsilon({Release(noise, rate): releases}, delta)
    assert expected - 2e-4 * max(1, expected) <= found <= expected * 1.005 + 0.011


def test_the_other_accountant_is_looser() -> None:
    spent = {Release(1.0, 0.01): 1000}
    assert epsilon_rdp(spent, 1e-5) == pytest.approx(2.10137, abs=1e-4)
    assert epsilon(spent, 1e-5) < epsilon_rdp(spent, 1e-5)


def test_one_gaussian_release_has_the_epsilon_of_its_closed_form() -> None:
    """Balle and Wang 2018, theorem 8: delta(epsilon) of the Gaussian mechanism, solved for epsilon."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def delta(eps: float, noise: float) -> float:
        return normal(0.5 / noise - eps * noise) - math.exp(eps) * normal(-0.5 / noise - eps * noise)

    for noise in (0.7, 1.0, 3.0):
        found = epsilon({Release(noise, 1.0): 1}, 1e-5)
        assert delta(found, noise) <= 1e-5 * (1 + 1e-6)
        assert delta(found * 0.99, noise) > 1e-5


@pytest.mark.parametrize(
    ("target", "rate", "releases", "delta", "noise"),
    [
        pytest.param(3.0, 0.01, 1000, 1e-5, 0.81358, marks=pytest.mark.slow),
        pytest.param(8.0, 0.1, 100, 1e-3, 0.77841, marks=pytest.mark.slow),
        (0.5, 0.25, 100, 1e-5, 17.72),
        (1.0, 0.25, 100, 1e-5, 9.48),
        (2.0, 0.25, 100, 1e-5, 5.15),
        (8.0, 0.25, 100, 1e-5, 1.71),
    ],
)
def test_calibrated_noise_is_the_least_that_keeps_the_target(
    target: float, rate: float, releases: int, delta: float, noise: float
) -> None:
    found = calibrate(target, delta=delta, sampling_rate=rate, releases=releases)
    assert found == pytest.approx(noise, rel=3e-3)
    assert epsilon({Release(found, rate): releases}, delta) <= target


def test_several_ledgers_on_the_same_data_cost_what_they_cost_together() -> None:
    one = {Release(1.0, 0.1): 60}
    two = {Release(1.0, 0.1): 40, Release(2.0, 1.0): 1}
    both = compose(one, two)
    assert both == {Release(1.0, 0.1): 100, Release(2.0, 1.0): 1}
    assert epsilon(both, 1e-5) > epsilon({Release(1.0, 0.1): 100}, 1e-5) > epsilon(one, 1e-5)


def test_a_budget_is_kept_to_the_release() -> None:
    budget, one = 2.0, Release(2.0, 0.2)
    over = bisect_left(range(1, 64), True, key=lambda n: not within({one: n}, 1e-5, budget))
    assert 1 < over < 63
    allowed = over  # the first one over the budget is number `over` + 1
    assert epsilon({one: allowed}, 1e-5) <= budget
    assert epsilon({one: allowed + 1}, 1e-5) > budget


def test_nothing_spent_is_zero_and_a_vacuous_guarantee_is_infinite() -> None:
    assert epsilon({}, 1e-5) == 0 == epsilon_rdp({}, 1e-5)
    assert epsilon({Release(0.01, 1.0): 10_000}, 1e-5) == math.inf


def test_a_release_with_next_to_no_noise_is_within_no_budget_whatever_else_was_spent() -> None:
    loud, quiet = Release(LEAST_NOISE * 0.99, 1.0), Release(100.0, 1.0)
    assert within({}, 1e-5, 0.1) and within({quiet: 1}, 1e-5, 1.0)
    for spent in ({loud: 1}, {loud: 1, quiet: 1}, {loud: 1, Release(100.0, 0.5): 1}):
        assert not within(spent, 1e-5, 1e9)
        assert epsilon(spent, 1e-5) == math.inf
    assert math.isfinite(epsilon({Release(LEAST_NOISE, 1.0): 1}, 1e-5))
    assert within({Release(LEAST_NOISE, 1.0): 1}, 1e-5, 1e4) and not within({quiet: 1}, 1e-5, 1e-9)


def test_releases_that_were_made_no_times_cost_nothing() -> None:
    spent = {Release(1.0, 0.1): 20, Release(0.5, 1.0): 0, Release(0.001, 0.3): 0}
    assert epsilon(spent, 1e-5) == epsilon({Release(1.0, 0.1): 20}, 1e-5)
    assert epsilon({Release(0.5, 1.0): 0}, 1e-5) == 0.0


def test_releases_without_sampling_cost_as_one_of_their_squares() -> None:
    """Dong, Roth and Su 2022: mu adds up by squares; beside sampled ones too."""
    several = {Release(2.0, 1.0): 3, Release(4.0, 1.0): 5}
    as_one = {Release((3 / 4 + 5 / 16) ** -0.5, 1.0): 1}
    assert epsilon(several, 1e-5) == pytest.approx(epsilon(as_one, 1e-5), rel=1e-9)
    sampled = {Release(1.0, 0.1): 10}
    assert epsilon(several | sampled, 1e-5) == pytest.approx(epsilon(as_one | sampled, 1e-5), rel=1e-9)
    assert epsilon({Release(2.0, 1.0): 4}, 1e-5) == pytest.approx(
        epsilon({Release(1.0, 1.0): 1}, 1e-5), rel=1e-3
    )


@pytest.mark.parametrize("relation", ["add-or-remove-one", "replace-one"])
def test_both_relations_are_dp_accountings_own(relation: Any) -> None:
    """One that is replaced moves the sum twice as far."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    kind = {
        "add-or-remove-one": dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": dp_accounting.NeighboringRelation.REPLACE_ONE,
    }[relation]
    spent, event = {Release(3.0, 1.0): 2}, dp_accounting.GaussianDpEvent(3.0)
    for ask, accountant in (
        (epsilon, PLDAccountant(kind, 1e-3)),
        (epsilon_rdp, RdpAccountant(neighboring_relation=kind)),
    ):
        accountant.compose(event, 2)
        assert ask(spent, 1e-5, relation) == pytest.approx(accountant.get_epsilon(1e-5), rel=5e-3)
    assert epsilon(spent, 1e-5, "replace-one") > 1.9 * epsilon(spent, 1e-5)


def test_a_profile_has_a_delta_for_each_epsilon_which_falls() -> None:
    """Balle and Wang 2018, theorem 8, of one release of noise 2."""
    epsilons = [0.0, 0.5, 1.0, 2.0]
    found = profile({Release(2.0, 1.0): 1}, epsilons)
    cdf = NormalDist().cdf
    expected = [cdf(0.25 - 2 * e) - math.exp(e) * cdf(-0.25 - 2 * e) for e in epsilons]
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-6) and found == sorted(found, reverse=True)
    twice = profile({Release(2.0, 1.0): 2}, epsilons)
    assert all(more > less for more, less in zip(twice, found, strict=True))


@pytest.mark.parametrize(
    ("value", "sane"),
    [
        (-1.0, 0.0),
        (0.0, 0.0),
        (3.5, 3.5),
        (9999.0, 9999.0),
        (1e4, math.inf),
        (math.inf, math.inf),
        (math.nan, math.inf),
    ],
)
def test_an_epsilon_is_a_number_from_zero_or_infinite(value: float, sane: float) -> None:
    assert _sane(value) == sane


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_a_target_that_is_none_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target epsilon must be finite and > 0"):
        calibrate(target, delta=1e-5, sampling_rate=1.0, releases=1)


@pytest.mark.parametrize(("target", "releases"), [(0.01, 1), (0.1, 7), (1.0, 50), (20.0, 3), (200.0, 40)])
def test_without_sampling_calibrated_noise_is_that_of_the_closed_form(target: float, releases: int) -> None:
    """To a tenth of a per cent, and never too little."""
    found = calibrate(target, delta=1e-5, sampling_rate=1.0, releases=releases)

    def delta(noise: float) -> float:
        mu = math.sqrt(releases) / noise
        return float(ndtr(mu / 2 - target / mu) - math.exp(target) * ndtr(-mu / 2 - target / mu))

    assert delta(found) <= 1e-5 * (1 + 1e-6)
    assert delta(found / 1.003) > 1e-5


@pytest.mark.parametrize(
    ("noise", "releases"), [(81.356, 7), (86.6, 7), (243.8, 1), (26.38, 50), (3.0, 2), (0.5, 3)]
)
def test_grids_that_agree_by_chance_or_are_worse_when_finer_mislead_nobody(
    noise: float, releases: int
) -> None:
    """Of 0.1 at 81 and 7 releases grids a tenth and three hundredths wide make 0.1 and 0.11."""
    mu = math.sqrt(releases) / noise
    exact = brentq(lambda e: ndtr(mu / 2 - e / mu) - math.exp(e) * ndtr(-mu / 2 - e / mu) - 1e-5, 0, 100)
    assert exact <= epsilon({Release(noise, 1.0): releases}, 1e-5) * (1 + 1e-9) <= exact * 1.0015


def test_a_target_that_no_noise_reaches_and_one_that_the_least_noise_keeps() -> None:
    with pytest.raises(ValueError, match="no noise multiplier below 1e6 reaches epsilon 1e-09"):
        calibrate(1e-9, delta=1e-12, sampling_rate=1.0, releases=1)
    assert calibrate(9000.0, delta=1e-5, sampling_rate=1.0, releases=1) == LEAST_NOISE


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_a_release_without_proper_noise_cannot_be_written_down(noise: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier must be finite and > 0"):
        Release(noise, 0.1)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_a_sampling_rate_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sampling_rate"):
        Release(1.0, rate)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_0_to_1_is_refused(delta: float) -> None:
    spent = {Release(1.0, 0.1): 1}
    for ask in (
        lambda: epsilon(spent, delta),
        lambda: epsilon_rdp(spent, delta),
        lambda: within(spent, delta, 1e9),
        lambda: within({}, delta, 1.0),
        lambda: calibrate(1.0, delta=delta, sampling_rate=0.1, releases=1),
    ):
        with pytest.raises(ValueError, match="delta must be in"):
            ask()


@pytest.mark.slow
@settings(max_examples=12 if IS_MATRIX else 4, deadline=None)
@given(
    st.floats(0.6 if IS_MATRIX else 1.0, 5.0),
    st.floats(0.01, 0.5 if IS_MATRIX else 0.2),
    st.integers(1, 200 if IS_MATRIX else 50),
)
def test_more_noise_fewer_releases_and_rarer_sampling_cost_less(
    noise: float, rate: float, releases: int
) -> None:
    spent = epsilon({Release(noise, rate): releases}, 1e-5)
    slack = 2e-3 * max(spent, 1e-3)
    assert epsilon({Release(noise * 1.2, rate): releases}, 1e-5) <= spent + slack
    assert epsilon({Release(noise, rate): releases + 10}, 1e-5) >= spent - slack
    assert epsilon({Release(noise, rate * 0.8): releases}, 1e-5) <= spent + slack


@pytest.mark.parametrize(
    ("edge", "under", "over"), [(0.3, 1.02, 1.03), (5.0, 1.00001, 1.05), (77.0, 1.05, 1.0)]
)
@pytest.mark.parametrize("steep", [1e-6, 1.0, 1e6])
def test_a_bracket_is_narrowed_whatever_the_curve_is_like(
    edge: float, under: float, over: float, steep: float
) -> None:
    """A line in logarithms, one that is nearly level, and one that is nearly a step."""
    asked: list[float] = []

    def curve(noise: float) -> float:
        below, above = ([one for one in asked if (one >= edge) == side] for side in (False, True))
        assert not below or not above or max(below) < noise < min(above), "outside of the bracket"
        asked.append(noise)
        return 2.0 * math.exp(max(-600.0, min(600.0, steep * math.log(edge / noise))))

    found = _narrowed(edge / under, edge * over, 2.0, curve)
    assert edge <= found <= edge * PRECISION and len(asked) < 40


INF = math.inf


@pytest.mark.parametrize(
    ("bounds", "target", "answer", "asked"),
    [
        ([5.0, 3.0], 3.0, True, 2),
        ([10.0, 6.0, 5.0], 2.9, False, 3),
        ([10.0, 6.0, 5.0, 4.9], 3.0, False, 4),
        ([2.0, 1.999], 1.998, False, 2),
        ([0.5, 0.4], 0.1, False, 2),
        ([0.5, 0.2, 0.19], 0.1, False, 3),
        ([0.5, 0.2, 0.21, 0.09], 0.1, False, 3),
        ([INF] * 5, 1.0, False, 5),
        ([INF, INF, 0.5], 1.0, True, 3),
        ([INF, 30.0, 29.0], 1.0, False, 3),
        ([2.0**-n for n in range(9)], 1e-4, False, 9),
        ([2.0**-n for n in range(9)], 2.0**-8, True, 9),
    ],
)
def test_a_noise_is_denied_as_soon_as_no_finer_grid_can_help(
    bounds: list[float], target: float, answer: bool, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On grids of .1, .03, .01, …: as long as they are wider than a tenth of the bound it may still fall."""
    grids: list[float] = []

    def bound(spent: Any, delta: float, relation: str, grid: float) -> float:
        grids.append(grid)
        return bounds[len(grids) - 1]

    monkeypatch.setattr(accounting, "_on_grid", bound)
    assert _suffices(SPENT, 1e-5, target, "add-or-remove-one") == answer
    assert grids == list(GRIDS[:asked])


SPENT = ((Release(1.0, 0.01), 100),)


@pytest.mark.parametrize(
    ("noise", "rate", "releases"),
    [(0.5, 0.01, 1000), (24.6, 0.001, 10_000), (1.55, 1e-4, 3000), (248.0, 1.0, 1), (5.0, 0.5, 30)],
)
def test_a_noise_suffices_where_epsilon_is_within_the_target(
    noise: float, rate: float, releases: int
) -> None:
    spent = ((Release(noise, rate), releases),)
    value, grid = _refined(spent, 1e-5, "add-or-remove-one")
    assert value == epsilon(dict(spent), 1e-5) and grid in GRIDS
    for by in (0.1, 0.5, 0.9, 0.998, 1.0, 1.002, 1.1, 2.0):
        assert _suffices(spent, 1e-5, by * value, "add-or-remove-one") == (by >= 1), by
