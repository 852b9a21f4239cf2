"""The price of discrete noise against sums over the lattice itself."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import integrate, stats

from atoll.privacy.accounting import Release, epsilon
from atoll.privacy.discrete_accounting import SLACK, Excess, discrete_epsilon, discrete_excess, sum_deviation


def pmf(variance: float, furthest: int) -> np.ndarray:
    """Of the discrete Gaussian, from -furthest to furthest."""
    weights = np.exp(-(np.arange(-furthest, furthest + 1.0) ** 2) / (2 * variance))
    whole = np.arange(-furthest - 200, furthest + 201.0)
    return weights / float(np.exp(-(whole**2) / (2 * variance)).sum())


def lattice_delta(eps: float, deviation: float, apart: tuple[int, ...]) -> float:
    """Of one release of a vector, whose neighbour is so far apart, by summing over the lattice."""
    furthest = int(9 * deviation) + max(apart)
    probability, loss = np.ones(()), np.zeros(())
    numbers = np.arange(-furthest, furthest + 1.0)
    for d in apart:
        probability = np.multiply.outer(probability, pmf(deviation**2, furthest))
        loss = np.add.outer(loss, (d * d + 2 * numbers * d) / (2 * deviation**2))
    return float((probability * np.maximum(0, -np.expm1(eps - loss))).sum())


def continuous_delta(eps: float, noise: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    above = float(stats.norm.sf(eps * noise - 0.5 / noise))
    return above - math.exp(eps) * float(stats.norm.sf(eps * noise + 0.5 / noise))


EPSILONS = np.linspace(0, 8, 161).tolist()


@pytest.mark.parametrize("deviation", [8, 64, 512])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_one_numbers_curve_is_below_that_of_the_continuous_noise_named(deviation: int, noise: float) -> None:
    apart = int(deviation / noise)
    excess = discrete_excess(Fraction(deviation) ** 2, 1)
    for eps in EPSILONS:
        truth = lattice_delta(eps, deviation, (apart,))
        bound = continuous_delta(eps, noise * excess.noise_factor)
        assert truth <= bound * (1 + 1e-9) + 1e-15
    # And no further above than the noise that is lost explains.
    at = lattice_delta(1.0, deviation, (apart,))
    assert continuous_delta(1.0, noise * excess.noise_factor) <= at * (1 + 40 / deviation**2 * 4)


@pytest.mark.parametrize(("deviation", "most"), [(8, 2.6e-4), (64, 4.1e-6), (512, 6.4e-8)])
def test_the_continuous_curve_itself_would_be_no_bound(deviation: int, most: float) -> None:
    epsilons = np.linspace(0, 10, 4001).tolist()
    over = max(lattice_delta(e, deviation, (deviation,)) - continuous_delta(e, 1.0) for e in epsilons)
    assert 0 < over <= most


@pytest.mark.parametrize("deviation", [5, 20])
def test_a_sums_exact_formula_is_that_of_canonne_kamath_and_steinke(deviation: int) -> None:
    def beyond(x: float) -> float:
        numbers = np.arange(-400, 401)
        return float(pmf(deviation**2, 400)[numbers > x].sum())

    apart = deviation
    for eps in (0.1, 1.03, 2.7):
        a = eps * deviation**2 / apart
        exact = beyond(a - apart / 2) - math.exp(eps) * beyond(a + apart / 2)
        assert lattice_delta(eps, deviation, (apart,)) == pytest.approx(exact, rel=1e-9)


def test_vectors_of_one_length_have_different_curves_all_below_the_bound() -> None:
    excess = discrete_excess(Fraction(36), 2)
    different = set()
    for eps in EPSILONS[::4]:
        bound = continuous_delta(eps, 6 / 5 * excess.noise_factor)
        for apart in ((3, 4), (5, 0), (4, 3)):
            assert lattice_delta(eps, 6.0, apart) <= bound
        different.add(round(lattice_delta(eps, 6.0, (3, 4)) - lattice_delta(eps, 6.0, (5, 0)), 9))
    assert len(different) > 10


@pytest.mark.parametrize(("variance", "smoothing"), [(2.0, 0.1), (2.0, 0.25), (5.0, 0.5), (5.0, 1.0)])
def test_processing_continuous_noise_gives_the_discrete_up_to_the_ratio_claimed(
    variance: float, smoothing: float
) -> None:
    """Peikert's theorem with t large enough to be seen: the integral over y, number by number."""
    q = math.exp(-2 * math.pi**2 * smoothing)
    t = 2 * (q + q**4 + q**9)
    near = np.arange(-40, 41)

    def kernel(x: int, y: float) -> float:
        weights = np.exp(-((near + round(y) - y) ** 2) / (2 * smoothing))
        return float(math.exp(-((x - y) ** 2) / (2 * smoothing)) / weights.sum())

    ratios = []
    for x in range(6):
        continuous = stats.norm(scale=math.sqrt(variance - smoothing)).pdf
        found, _ = integrate.quad(
            lambda y, x=x, density=continuous: density(y) * kernel(x, y),
            x - 9,
            x + 9,
            limit=400,
            epsabs=1e-14,
        )
        ratios.append(math.log(pmf(variance, 40)[40 + x] / found))
    claimed = math.log((1 + t) / (1 - t))
    assert max(map(abs, ratios)) <= claimed + 1e-8
    if smoothing < 0.3:
        assert max(map(abs, ratios)) > claimed / 1000


def test_sampled_and_composed_it_is_dp_accountings_discrete_gaussian() -> None:
    """Their PLD of a discrete Gaussian of 64 steps, ten releases at a rate of 0.1, on a fine grid."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    excess = discrete_excess(Fraction(64) ** 2, 10)
    bound = discrete_epsilon({Release(1.0, 0.1): 10}, 1e-5, excess)
    theirs = [
        pld.from_discrete_gaussian_mechanism(
            64.0,
            64,
            pessimistic_estimate=is_above,
            value_discretization_interval=1e-4,
            sampling_prob=0.1,
        )
        .self_compose(10)
        .get_epsilon_for_delta(1e-5)
        for is_above in (False, True)
    ]
    assert theirs[0] <= bound
    assert bound == pytest.approx(theirs[1], rel=0.005)


@pytest.mark.parametrize("bits", [20, 24, 28])
def test_at_the_lattices_fineness_the_price_is_below_what_floats_tell(bits: int) -> None:
    """10 million numbers, 100,000 releases: the deviation loses under 3e-12 of itself."""
    excess = discrete_excess(Fraction(2) ** (2 * bits), 10**12)
    assert excess.slack == SLACK
    assert 1 - excess.noise_factor <= 2.6 / 2 ** (2 * bits) + 3e-16
    assert excess.noise_factor < 1
    spent = {Release(1.0, 0.01): 1000}
    assert discrete_epsilon(spent, 1e-5, excess) == pytest.approx(epsilon(spent, 1e-5), rel=1e-9)


def test_slack_and_lost_noise_are_both_charged() -> None:
    spent = {Release(1.0, 1.0): 1}
    assert discrete_epsilon(spent, 1e-5, Excess(1.0, 0.5)) == pytest.approx(
        epsilon(spent, 1e-5 * math.exp(-0.5)) + 1
    )
    assert discrete_epsilon(spent, 1e-5, Excess(0.5, 0.0)) == epsilon({Release(0.5, 1.0): 1}, 1e-5)


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), Fraction(1)])
@pytest.mark.parametrize("shares", [1, 2, 3, 6])
def test_a_sum_of_discrete_gaussians_is_as_close_to_one_as_claimed(variance: Fraction, shares: int) -> None:
    total = one = pmf(float(variance), 25)
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    centre = len(total) // 2
    whole = pmf(float(variance) * shares, 8)
    found = float(np.abs(np.log(total[centre - 8 : centre + 9] / whole)).max())
    claimed = sum_deviation(variance, shares)
    assert found <= claimed + 1e-12
    if shares == 2:
        assert claimed <= 3 * found + 1e-12


def test_shares_add_what_their_sum_is_off_by() -> None:
    whole = discrete_excess(Fraction(16), 1000)
    shared = discrete_excess(Fraction(4), 1000, shares=4)
    assert shared.noise_factor == whole.noise_factor
    assert shared.slack == pytest.approx(1000 * sum_deviation(Fraction(4), 4), rel=1e-9)
    assert sum_deviation(Fraction(20), 1000) < 1e-80


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="variance must be >= 7"):
        discrete_excess(Fraction(7), 1)
    with pytest.raises(ValueError, match="numbers and shares must be >= 1, got 0 and 1"):
        discrete_excess(Fraction(100), 0)
    with pytest.raises(ValueError, match="a share's variance must be >= 1/4"):
        discrete_excess(Fraction(1, 5), 1, shares=100)


@pytest.mark.parametrize(("numbers", "variance", "shares"), [(1, 900, 1), (10**6, 900, 1), (10**6, 300, 7)])
def test_the_factor_is_the_one_of_the_smoothing_that_so_many_numbers_need(
    numbers: int, variance: int, shares: int
) -> None:
    smoothing = math.log(8 * numbers / 1e-30) / (2 * math.pi**2)
    found = discrete_excess(Fraction(variance), numbers, shares).noise_factor
    assert found**2 == pytest.approx(1 - smoothing / (variance * shares), rel=1e-14)
    assert discrete_excess(Fraction(2.001 * smoothing / shares), numbers, shares).noise_factor > 0.7
    with pytest.raises(ValueError, match=r"variance must be >= "):
        discrete_excess(Fraction(1.999 * smoothing / shares), numbers, shares)


def test_a_sum_of_shares_deviates_by_the_papers_bound_for_every_number() -> None:
    assert sum_deviation(Fraction(1), 2) == pytest.approx(5 * math.exp(-(math.pi**2)), rel=1e-14)
    both = math.exp(-(math.pi**2) * 4) + math.exp(-(math.pi**2) * 16 / 3)
    assert discrete_excess(Fraction(4), 1000, 3).slack == pytest.approx(
        1e-30 + 1000 * 5 * both, rel=1e-9, abs=0
    )
    assert sum_deviation(Fraction(1, 10), 1) == 0.0
    for shares in (2, 3):
        with pytest.raises(ValueError, match="a share's variance must be >= 1/4"):
            sum_deviation(Fraction(1, 10), shares)
