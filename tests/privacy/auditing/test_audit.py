"""Lower bounds on epsilon: against exact distributions, simulated mechanisms and other libraries."""

import math
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm
from sklearn.metrics import roc_auc_score

from atoll.privacy.accounting import Release, epsilon, profile
from atoll.privacy.auditing.epsilon_bounds import (
    GAUSSIAN,
    Family,
    Guesses,
    Inverse,
    best,
    gaussian_epsilon,
    gaussian_inverse,
    guessed,
    lower_bound,
    lower_bound_in_family,
    p_value,
    profile_inverse,
    refutes,
)
from atoll.privacy.auditing.membership import area, clopper_pearson, epsilon_of_rates, log_ratios, rate_at

RESPONSE = 1 / (1 + math.exp(-1.0))
"""How often randomized response of epsilon 1 tells the truth."""


@pytest.mark.parametrize("canaries", [100, 1000, 10_000])
def test_all_guesses_right_give_a_finite_bound_that_grows_as_the_logarithm(canaries: int) -> None:
    # Without delta the tail is chance^m = 5 %, so epsilon = logit(.05^(1/m)), nearly log(m / 3).
    found = lower_bound(Guesses(canaries, canaries, canaries), delta=0, confidence=0.95)
    chance = 0.05 ** (1 / canaries)
    assert found == pytest.approx(math.log(chance / (1 - chance)), abs=1e-5)
    assert found == pytest.approx(math.log(canaries / -math.log(0.05)), abs=0.02)


@pytest.mark.parametrize(("made", "right"), [(100, 60), (100, 73), (40, 40), (7, 0)])
def test_without_delta_the_p_value_is_the_binomial_test(made: int, right: int) -> None:
    expected = binomtest(right, made, RESPONSE, alternative="greater").pvalue
    assert p_value(Guesses(100, made, right), 1.0, 0.0) == pytest.approx(expected, rel=1e-9)


def slow_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """The theorem term by term."""
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    each = [binom.pmf(k, guesses.made, chance) for k in range(guesses.made + 1)]
    steepest = max(
        (sum(each[max(guesses.right - i, 0) : guesses.right]) / i for i in range(1, guesses.canaries + 1)),
        default=0.0,
    )
    return float(min(1.0, sum(each[guesses.right :]) + 2 * guesses.canaries * delta * steepest))


@given(st.integers(1, 40), st.data(), st.floats(0, 4), st.sampled_from([0.0, 1e-6, 1e-3, 0.1]))
@settings(max_examples=60, deadline=None)
def test_the_p_value_is_the_theorem_term_by_term(
    canaries: int, data: st.DataObject, epsilon: float, delta: float
) -> None:
    made = data.draw(st.integers(0, canaries))
    guesses = Guesses(canaries, made, data.draw(st.integers(0, made)))
    assert p_value(guesses, epsilon, delta) == pytest.approx(
        slow_p_value(guesses, epsilon, delta), rel=1e-9, abs=1e-15
    )


@pytest.mark.parametrize("delta", [1e-4, 1e-2])
def test_no_mechanism_is_right_more_often_than_the_p_value_says(delta: float) -> None:
    """Two that use up their delta: each bit told for sure with probability delta, or all bits at once."""
    count = 60
    for right in range(count + 1):
        allowed = p_value(Guesses(count, count, right), 1.0, delta)
        tail = float(binom.sf(right - 1, count, RESPONSE))
        each_alone = float(binom.sf(right - 1, count, delta + (1 - delta) * RESPONSE))
        assert each_alone <= allowed + 1e-12
        assert delta + (1 - delta) * tail <= allowed + 1e-12


def randomized_response(canaries: int, generator: np.random.Generator) -> Guesses:
    return Guesses(canaries, canaries, int((generator.random(canaries) < RESPONSE).sum()))


def test_the_bound_on_randomized_response_holds_and_is_nearly_tight() -> None:
    generator = np.random.default_rng(3)
    found = np.array(
        [lower_bound(randomized_response(20_000, generator), delta=0, confidence=0.95) for _ in range(200)]
    )
    # 5 % may exceed the truth; of 200, by more than 5 deviations never more than 26.
    assert 0 < (found > 1.0).sum() <= 26
    assert 0.93 < np.median(found) < 1.0


@given(st.integers(8, 200), st.data(), st.sampled_from([0.0, 1e-5]))
@settings(max_examples=30, deadline=None)
def test_one_more_right_guess_never_proves_less(canaries: int, data: st.DataObject, delta: float) -> None:
    made = data.draw(st.integers(4, canaries))
    right = data.draw(st.integers(0, made - 1))

    def bound(value: int, confidence: float = 0.95) -> float:
        return lower_bound(Guesses(canaries, made, value), delta=delta, confidence=confidence)

    assert bound(right) <= bound(right + 1) + 1e-6
    assert bound(right, 0.99) <= bound(right) + 1e-6


def test_the_surest_guesses_are_the_outermost_scores() -> None:
    scores = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    inside = np.array([True, False, False, True, True, False])
    # The two highest (5, 4) are guessed in: one rightly; the two lowest (0, 1) out: both rightly.
    assert guessed(scores, inside, 4) == Guesses(6, 4, 3)
    assert guessed(scores, inside, 6) == Guesses(6, 6, 4)
    # Of an odd number, one more is guessed in: 5, 4 and, out, 0.
    assert guessed(scores, inside, 3) == Guesses(6, 3, 2)


def test_choosing_the_best_number_of_guesses_pays_for_all_that_were_tried() -> None:
    scores, inside = np.arange(64.0), np.arange(64) >= 32
    asked: list[tuple[int, float]] = []

    def bound(guesses: Guesses, confidence: float) -> float:
        asked.append((guesses.made, confidence))
        return lower_bound(guesses, delta=0, confidence=confidence)

    found = best(scores, inside, bound, 0.95)
    # 1/64 and 1/16 of 64 canaries are fewer than 8 guesses: 8, 16, 32, 64 are left, each at 1 - .05/4.
    assert asked == [(made, pytest.approx(0.9875)) for made in (8, 16, 32, 64)]
    chance = 0.0125 ** (1 / 64)
    assert found.epsilon == pytest.approx(math.log(chance / (1 - chance)), abs=1e-5)
    assert found.to_json()["guesses"] == found.to_json()["right"] == 64


@pytest.mark.parametrize("noise", [0.8, 1.0, 4.0])
def test_epsilon_of_a_gaussian_release_is_the_accountants(noise: float) -> None:
    expected = epsilon({Release(noise, 1.0): 4}, 1e-5)
    assert gaussian_epsilon(2 / noise, 1e-5) == pytest.approx(expected, rel=2e-3)
    assert Family(1.0, 4).epsilon(noise, 1e-5) == pytest.approx(expected, rel=2e-3)


def test_a_profile_has_the_trade_off_curve_of_its_mechanism() -> None:
    """A curve from (epsilon, delta) pairs alone is the Gaussian's own, from below and closely."""
    epsilons = np.linspace(0, 15, 1501)
    deltas = norm.cdf(0.5 - epsilons) - np.exp(epsilons) * norm.cdf(-0.5 - epsilons)  # mu = 1
    from_pairs, exact = profile_inverse(epsilons.tolist(), deltas.tolist()), gaussian_inverse(1.0)
    for x in (1e-6, 0.01, 0.3, 0.5, 0.9, 0.999):
        assert from_pairs(x) <= exact(x) + 1e-12
        assert from_pairs(x) == pytest.approx(exact(x), rel=1e-3, abs=1e-9)


def test_the_accountants_profile_is_the_closed_form() -> None:
    [found] = profile({Release(1.0, 1.0): 1}, [1.0])
    assert found == pytest.approx(norm.cdf(-0.5) - math.e * norm.cdf(-1.5), rel=1e-2)


def least_refuting(made: int, canaries: int, inverse: Inverse) -> int:
    return bisect_left(
        range(made + 1), True, key=lambda n: refutes(Guesses(canaries, made, n), inverse, 0.95)
    )


@pytest.mark.parametrize("count", [30, 300, 2000])
def test_what_f_dp_refutes_is_unlikely_for_the_mechanism_itself(count: int) -> None:
    """Exact tails, every canary guessed: randomized response uses the bound up, a Gaussian is far from it."""
    response = least_refuting(count, count, profile_inverse([1.0], [0.0]))
    assert 0.02 < binom.sf(response - 1, count, RESPONSE) <= 0.05
    gaussian = least_refuting(count, count, gaussian_inverse(1.0))
    assert binom.sf(gaussian - 1, count, norm.cdf(0.5)) <= 0.05
    assert not refutes(Guesses(count, count, count), gaussian_inverse(100.0), 0.95)


def slow_refutes(guesses: Guesses, inverse: Inverse, confidence: float) -> bool:
    """Mahloujifar et al. 2024, algorithm 1, as it is written: r and h by index, from the top down."""
    m, k, c, tau = guesses.canaries, guesses.made, guesses.right, 1 - confidence
    h, r = [0.0] * (c + 1), [0.0] * (c + 1)
    r[c], h[c] = tau * c / m, tau * (k - c) / m
    for i in range(c - 1, -1, -1):
        h[i] = max(h[i + 1], inverse(r[i + 1]))
        r[i] = r[i + 1] + i / (k - i) * (h[i] - h[i + 1])
    return any(one + other > k / m for one, other in zip(r[:-1], h[:-1], strict=True))


@pytest.mark.parametrize(
    "inverse", [gaussian_inverse(0.3), gaussian_inverse(2.0), profile_inverse([0.5], [0.01])]
)
def test_guesses_are_refuted_where_the_recursion_as_written_refutes_them(inverse: Inverse) -> None:
    seen = set()
    for canaries, made in ((1, 1), (4, 3), (6, 6), (12, 8), (40, 25)):
        for right in range(made + 1):
            for confidence in (0.3, 0.6, 0.9, 0.99):
                guesses = Guesses(canaries, made, right)
                expected = slow_refutes(guesses, inverse, confidence)
                assert refutes(guesses, inverse, confidence) == expected, (guesses, confidence)
                seen.add(expected)
    assert seen == {False, True}


def test_a_family_without_sampling_is_exact_and_its_most_noise_tells_next_to_nothing() -> None:
    family = Family(1.0, 100)
    assert family.most_noise == 2000.0  # mu is 10 / 2000
    assert family.curve(5.0)(0.3) == gaussian_inverse(2.0)(0.3)
    assert family.epsilon(5.0, 1e-5) == gaussian_epsilon(2.0, 1e-5)
    assert family.epsilon(family.most_noise, 1e-5) == pytest.approx(gaussian_epsilon(0.005, 1e-5))
    assert gaussian_epsilon(0.005, 1e-5) < 0.02
    assert Family(0.25, 100).spent(2.0) == {Release(2.0, 0.25): 100}


def test_guesses_that_are_no_better_than_coins_prove_exactly_nothing() -> None:
    for right, confidence in ((50, 0.05), (45, 0.05), (55, 0.95)):
        guesses = Guesses(100, 100, right)
        assert lower_bound_in_family(guesses, GAUSSIAN, delta=1e-5, confidence=confidence) == 0.0
    assert lower_bound_in_family(Guesses(100, 100, 80), GAUSSIAN, delta=1e-5, confidence=0.95) > 0
    assert Family(sampling_rate=1.0, releases=1) == GAUSSIAN
    for delta, confidence in ((-0.1, 0.95), (1.0, 0.95), (0.0, 1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match=r"must be in [\[(]0, 1\)"):
            lower_bound_in_family(Guesses(10, 5, 5), GAUSSIAN, delta=delta, confidence=confidence)


def gaussian_scores(
    count: int, noise: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    inside = generator.random(count) < 0.5
    return inside + noise * generator.standard_normal(count), inside


def test_the_f_dp_bound_on_a_gaussian_holds_and_is_tighter_than_the_one_run_bound() -> None:
    generator, truth = np.random.default_rng(5), gaussian_epsilon(1.0, 1e-5)
    family = Family(1.0, 1)
    plain, kind = [], []
    for _ in range(20):
        scores, inside = gaussian_scores(1000, 1.0, generator)
        plain.append(
            best(scores, inside, lambda g, c: lower_bound(g, delta=1e-5, confidence=c), 0.95).epsilon
        )
        kind.append(
            best(
                scores, inside, lambda g, c: lower_bound_in_family(g, family, delta=1e-5, confidence=c), 0.95
            ).epsilon
        )
    assert max(plain) < truth and sum(found > truth for found in kind) <= 1
    assert np.median(plain) < np.median(kind)
    assert np.median(kind) > 0.4 * truth


def test_a_sampled_mechanism_has_a_curve_of_its_own() -> None:
    """With few and rare releases less can be proven than of the same noise without sampling."""
    guesses = Guesses(1000, 250, 240)
    found = [
        lower_bound_in_family(guesses, Family(rate, 4), delta=1e-5, confidence=0.95) for rate in (0.5, 1.0)
    ]
    assert 1.0 < found[1] < found[0] < 12
    assert lower_bound_in_family(Guesses(1000, 250, 125), Family(0.5, 4), delta=1e-5, confidence=0.95) == 0


@pytest.mark.parametrize("wrong", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_guesses_that_cannot_be_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= right <= made <= canaries"):
        Guesses(*wrong)
    for delta, confidence in ((-0.1, 0.95), (1.0, 0.95), (0.0, 1.0)):
        with pytest.raises(ValueError, match=r"must be in [\[(]0, 1\)"):
            lower_bound(Guesses(10, 5, 5), delta=delta, confidence=confidence)


def test_rates_and_area_are_those_of_the_roc_curve() -> None:
    generator = np.random.default_rng(2)
    scores, inside = gaussian_scores(400, 1.0, generator)
    scores = np.round(scores, 1)  # with ties
    assert area(scores, inside) == pytest.approx(roc_auc_score(inside, scores))
    # Of those outside, sorted, one in four may be above the threshold: 3 of 4 members are above it.
    scores, inside = np.array([1, 2, 3, 4, 2.5, 3.5, 4.5, 5]), np.arange(8) >= 4
    assert rate_at(scores, inside, 0.25) == 0.75
    assert rate_at(scores, inside, 0.0) == 0.5
    assert rate_at(scores, inside, 1.0) == 1.0
    # A score that is as high as the threshold isn't above it.
    assert rate_at(np.array([1.0, 2.0, 2.0, 3.0]), np.arange(4) >= 2, 0.0) == 0.5


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (3, 10), (10, 10), (57, 400)])
def test_bounds_of_a_rate_are_the_exact_ones(hits: int, trials: int) -> None:
    expected = binomtest(hits, trials).proportion_ci(confidence_level=0.95, method="exact")
    low, high = clopper_pearson(hits, trials, 0.025)
    assert (low, high) == (pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6))


def test_a_likelihood_ratio_is_that_of_the_fitted_gaussians() -> None:
    """Two canaries, four shadows: means by hand, a deviation that they share; and one canary alone."""
    shadows = np.array([[1.0, 5.0], [3.0, 7.0], [0.0, 1.0], [2.0, 3.0]])
    inside = np.array([[True, True], [True, True], [False, False], [False, False]])
    # In: means 2 and 6, squares 1+1+1+1 over 2 degrees of freedom; out: means 1 and 2, the same squares.
    scores, spread = np.array([2.5, 2.0]), math.sqrt(2)
    expected = norm.logpdf(scores, [2, 6], spread) - norm.logpdf(scores, [1, 2], spread)
    np.testing.assert_allclose(log_ratios(scores, shadows, inside), expected)
    alone = log_ratios(scores[:1], np.array([[1.0], [4.0], [0.0], [2.0]]), inside[:, :1])
    spreads = math.sqrt(1.5**2 + 1.5**2), math.sqrt(2)
    by_hand = norm.logpdf(2.5, 2.5, spreads[0]) - norm.logpdf(2.5, 1, spreads[1])
    np.testing.assert_allclose(alone, [by_hand])


def test_a_canary_that_no_shadow_run_had_is_judged_by_the_mean_of_all() -> None:
    """The third was in no run, the fourth in every one: what is missing of them is the others' mean."""
    shadows = np.array([[1.0, 5.0, 9.0, 4.0], [3.0, 7.0, 7.0, 6.0], [0.0, 1.0, 8.0, 2.0]])
    inside = np.array([[True, True, False, True], [True, True, False, True], [False, False, False, True]])
    means_in, means_out = [2, 6, 28 / 7, 4], [0, 1, 8, 25 / 5]
    spread_in = math.sqrt((1 + 1 + 1 + 1 + 0 + 4 + 4) / (1 + 1 + 2))
    spread_out = math.sqrt((1 + 1 + 0) / 2)
    scores = np.array([2.5, 2.0, 3.0, 1.0])
    expected = norm.logpdf(scores, means_in, spread_in) - norm.logpdf(scores, means_out, spread_out)
    np.testing.assert_allclose(log_ratios(scores, shadows, inside), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e9])
def test_shadows_that_are_all_alike_give_a_finite_ratio_or_none(value: float) -> None:
    shadows, inside = np.full((4, 3), value), np.arange(12).reshape(4, 3) % 2 == 0
    ratios = log_ratios(np.full(3, value), shadows, inside)
    assert ratios.tolist() == [0.0, 0.0, 0.0]
    nobody = log_ratios(np.full(3, value), shadows, np.zeros((4, 3), dtype=bool))
    assert np.isfinite(nobody).all()


def test_shadows_tell_members_from_others_where_a_plain_score_does_not() -> None:
    """Every canary has its own level: only shadows know it."""
    generator = np.random.default_rng(8)
    level = 20 * generator.standard_normal(600)

    def run() -> tuple[np.ndarray, np.ndarray]:
        inside = generator.random(600) < 0.5
        return level + 2 * inside + generator.standard_normal(600), inside

    (scores, inside), shadows = run(), [run() for _ in range(16)]
    ratios = log_ratios(scores, np.stack([s for s, _ in shadows]), np.stack([i for _, i in shadows]))
    assert area(scores, inside) < 0.6
    # Gaussians two deviations apart: Phi(sqrt 2) = .92, a little less with fitted means.
    assert 0.86 < area(ratios, inside) < 0.95


@pytest.mark.parametrize("delta", [0.0, 0.01])
def test_epsilon_of_the_rates_is_that_of_the_exact_bounds_at_a_corrected_confidence(delta: float) -> None:
    """Of 100 canaries in and 200 out; nine thresholds with two sides and two rates each share the doubt."""
    inside = np.arange(300) < 100
    for right, wrong, expected_side in ((90, 20, "in"), (60, 2, "in"), (99, 120, "out")):
        told = np.concatenate([np.arange(100) < right, np.arange(200) < wrong])
        scores = np.where(told, 0.5, -0.5)
        doubt = (1 - 0.95) / (2 * 2 * 9)
        sides = {}
        for side, hits, n, others, m in (
            ("in", right, 100, wrong, 200), ("out", 200 - wrong, 200, 100 - right, 100),
        ):  # fmt: skip
            low = binomtest(hits, n).proportion_ci(1 - 2 * doubt, method="exact").low
            high = binomtest(others, m).proportion_ci(1 - 2 * doubt, method="exact").high
            sides[side] = math.log(max((low - delta) / high, 1.0))
        assert max(sides, key=lambda side: sides[side]) == expected_side
        found = epsilon_of_rates(scores, inside, delta=delta, confidence=0.95)
        assert found == pytest.approx(sides[expected_side], abs=1e-6) and found > 0
    assert epsilon_of_rates(np.zeros(300), inside, delta=delta, confidence=0.95) == 0.0


def test_epsilon_of_the_rates_holds_for_randomized_response() -> None:
    generator, found = np.random.default_rng(4), []
    for _ in range(100):
        inside = generator.random(2000) < 0.5
        told = np.where(generator.random(2000) < RESPONSE, inside, ~inside)
        scores = np.where(told, 1.0, -1.0) * 0.5
        found.append(epsilon_of_rates(scores, inside, delta=0.0, confidence=0.95))
    assert sum(value > 1.0 for value in found) <= 5
    assert 0.6 < float(np.median(found)) < 1.0
