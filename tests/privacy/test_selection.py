"""What picking the best of private runs costs: the paper's statements, and another implementation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atoll.privacy.accounting import UNREACHABLE, Release, epsilon, epsilon_rdp
from atoll.privacy.selection import (
    Curve,
    Poisson,
    Repetitions,
    TruncatedNegativeBinomial,
    best_of,
    epsilon_of_all,
    epsilon_of_best,
    worst,
)

RUN = {Release(2.0, 0.1): 100}
ONE = {Release(4.0, 1.0): 1}
ORDERS = np.concatenate([1 + np.geomspace(0.01, 10, 400), np.geomspace(11.5, 1e7, 400)])
FEW = np.concatenate([1 + np.geomspace(0.05, 10, 30), np.geomspace(11.5, 1e4, 20)])


def zcdp(rho: float, orders: NDArray[np.float64] = ORDERS) -> Curve:
    """The curve of a Gaussian release: order times rho."""
    return Curve(orders, rho * orders)


def test_one_run_for_sure_costs_what_the_run_costs() -> None:
    surely = TruncatedNegativeBinomial(shape=1, gamma=1)
    assert surely.mean == 1
    assert epsilon_of_best([RUN], 1e-5, surely) == pytest.approx(epsilon_rdp(RUN, 1e-5))


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.5, 0.1])
def test_the_mean_is_that_of_the_distribution(shape: float, gamma: float) -> None:
    """Definition 1: P[K = k] is proportional to (1 - gamma)^k times the product of (l + shape) / (l + 1)."""
    weight, weights = 1.0, []
    for k in range(1, 2000):
        # the factor of l = 0 is `shape`, which cancels: it is left out, so that shape = 0 works as well
        weight *= (1 - gamma) * ((k - 1 + shape) / k if k > 1 else 1.0)
        weights.append(weight)
    mean = sum(k * w for k, w in enumerate(weights, 1)) / sum(weights)
    assert TruncatedNegativeBinomial(shape, gamma).mean == pytest.approx(mean, rel=1e-9)


def test_the_best_of_a_geometric_number_of_pure_runs_costs_three_times_one() -> None:
    """Theorem 2 with both orders going to infinity: (2 + eta) epsilon, whatever gamma."""
    pure = Curve(ORDERS, np.full_like(ORDERS, 0.1))
    for shape, gamma in ((1, 0.01), (1, 0.2), (0, 0.01)):
        found = best_of(pure, TruncatedNegativeBinomial(shape, gamma)).divergence[-1]
        assert found == pytest.approx((2 + shape) * 0.1, rel=1e-4)


def test_concentrated_privacy_has_the_closed_form_of_corollary_4() -> None:
    """With divergence rho times order, the second order that costs least is sqrt(log(1/gamma) / rho)."""
    rho, gamma, shape = 0.01, 0.02, 1.0
    found = best_of(zcdp(rho), TruncatedNegativeBinomial(shape, gamma))
    least = (1 + shape) * (2 * math.sqrt(rho * math.log(1 / gamma)) - rho)
    expected = rho * ORDERS + least + math.log(1 / gamma) / (ORDERS - 1)
    assert found.divergence == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "mean"), [(1.0, 5.0), (1.0, 200.0), (0.0, 20.0), (0.5, 20.0), (math.inf, 3.0), (math.inf, 50.0)]
)
@pytest.mark.parametrize("spent", [RUN, ONE], ids=["sampled", "gaussian"])
def test_it_agrees_with_dp_accounting(spent: dict[Release, int], shape: float, mean: float) -> None:
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    [(release, count)] = spent.items()
    event = dp_event.GaussianDpEvent(release.noise_multiplier)
    sampled = dp_event.PoissonSampledDpEvent(release.sampling_rate, event)
    run = dp_event.SelfComposedDpEvent(sampled if release.sampling_rate < 1 else event, count)
    accountant = RdpAccountant()
    accountant.compose(dp_event.RepeatAndSelectDpEvent(run, mean, shape))
    ours: Repetitions = Poisson(mean)
    if math.isfinite(shape):
        ours = TruncatedNegativeBinomial(shape, _gamma(shape, mean))
    assert epsilon_of_best([spent], 1e-6, ours) == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-6)


def _gamma(shape: float, mean: float) -> float:
    low, high = 1e-9, 1.0
    for _ in range(200):
        middle = math.sqrt(low * high)
        is_more = TruncatedNegativeBinomial(shape, middle).mean > mean
        low, high = (middle, high) if is_more else (low, middle)
    return low


@settings(max_examples=25, deadline=None)
@given(st.floats(1, 500), st.floats(1.01, 4), st.floats(0.001, 0.5))
def test_more_runs_never_cost_less(mean: float, times: float, rho: float) -> None:
    once = zcdp(rho, FEW)
    fewer, more = best_of(once, Poisson(mean)), best_of(once, Poisson(mean * times))
    assert once.epsilon(1e-5) <= fewer.epsilon(1e-5) <= more.epsilon(1e-5) * (1 + 1e-12)


def test_a_random_number_of_runs_costs_far_less_than_a_fixed_one() -> None:
    """A geometric number costs a few times one run; Poisson's is for runs of small epsilon."""
    trials, small = [RUN] * 50, [{Release(20.0, 0.1): 100}] * 50
    once, fixed = epsilon(RUN, 1e-5), epsilon_of_all(trials, 1e-5)
    geometric = epsilon_of_best(trials, 1e-5, TruncatedNegativeBinomial(shape=1, gamma=1 / 50))
    assert once < geometric < 5 * once < fixed
    assert fixed == epsilon({Release(2.0, 0.1): 5000}, 1e-5)
    poisson = epsilon_of_best(small, 1e-5, Poisson(50))
    assert epsilon(small[0], 1e-5) < poisson < epsilon_of_all(small, 1e-5)


def test_trials_that_differ_are_charged_as_the_worst_of_them() -> None:
    cheap = {Release(8.0, 0.1): 100}
    both = epsilon_of_best([cheap, RUN, cheap], 1e-5, Poisson(3))
    assert both == epsilon_of_best([RUN], 1e-5, Poisson(3)) > epsilon_of_best([cheap], 1e-5, Poisson(3))
    assert epsilon_of_all([cheap, RUN], 1e-5) > epsilon_of_all([RUN], 1e-5)
    mixed = worst([zcdp(0.1), Curve(ORDERS, np.full_like(ORDERS, 1.0))])
    assert mixed.divergence == pytest.approx(np.maximum(0.1 * ORDERS, 1.0))


@pytest.mark.parametrize("mean", [0.5, math.inf, math.nan])
def test_a_mean_number_of_runs_below_one_is_refused(mean: float) -> None:
    with pytest.raises(ValueError, match="mean must be finite and >= 1"):
        Poisson(mean)


def test_parameters_outside_the_theorem_are_refused() -> None:
    with pytest.raises(ValueError, match="shape must be finite and > -1"):
        TruncatedNegativeBinomial(-1, 0.5)
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]"):
        TruncatedNegativeBinomial(1, 0)
    with pytest.raises(ValueError, match="at least one trial"):
        epsilon_of_best([], 1e-5, Poisson(2))
    with pytest.raises(ValueError, match="orders above 1"):
        Curve(np.array([1.0]), np.array([0.1]))


@pytest.mark.parametrize("divergence", [2 * UNREACHABLE, math.inf, math.nan])
def test_a_curve_that_bounds_nothing_has_no_epsilon(divergence: float) -> None:
    """A figure there would look like a promise."""
    orders = np.array([2.0, 8.0, 64.0])
    assert Curve(orders, np.full(3, divergence)).epsilon(1e-5) == math.inf
    bounded = np.full(3, 0.5)
    assert 0 < Curve(orders, bounded).epsilon(1e-5) < math.inf
    for place in range(3):
        one = np.array([divergence if place == other else 0.5 for other in range(3)])
        others = np.delete(orders, place)
        assert Curve(orders, one).epsilon(1e-5) == Curve(others, bounded[:2]).epsilon(1e-5)


def test_a_small_price_is_told_as_small() -> None:
    """At most zCDP's bound (Bun and Steinke 2016, proposition 1.3): rho + 2 sqrt(rho log(1 / delta))."""
    rho, delta = 1e-4, 1e-5
    bound = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    assert 0.5 * bound < zcdp(rho).epsilon(delta) <= bound
    assert zcdp(1e-12).epsilon(0.5) == 0.0


@pytest.mark.parametrize("gamma", [-0.5, 0.0, 1.0001, 1.5, math.nan])
def test_a_gamma_that_is_no_part_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        TruncatedNegativeBinomial(shape=1, gamma=gamma)
