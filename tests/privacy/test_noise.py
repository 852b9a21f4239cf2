"""Noise: its distribution, its lattice, where it comes from."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atoll.errors import ConfigError
from atoll.privacy import accounting
from atoll.privacy.accounting import DISCRETE_PART, Release
from atoll.privacy.discrete_accounting import discrete_excess
from atoll.privacy.noise import FINENESS, Lattice, entropy, lattice_for, seeded


@pytest.mark.parametrize("words", [entropy, seeded(7)], ids=["entropy", "seed"])
def test_noise_is_gaussian_with_its_deviation_to_half_a_percent(words) -> None:  # type: ignore[no-untyped-def]
    noise = Lattice(0.3, words).noise(1_000_000)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.005)
    assert abs(float(noise.mean())) < 4 * 0.3 / 1000
    # Kolmogorov and Smirnov's distance of a million draws stays below 1.95 / 1000 in 999 of 1,000 cases.
    assert stats.kstest(noise / 0.3, "norm").statistic < 1.95e-3
    # Mean of the fourth power is 3, its own deviation sqrt(96).
    assert abs(float(((noise / 0.3) ** 4).mean()) - 3) < 4 * math.sqrt(96) / 1000


def test_tails_are_as_long_as_they_must_be() -> None:
    beyond = float((np.abs(Lattice(1.0, seeded(7)).noise(2_000_000)) > 4).mean())
    assert beyond == pytest.approx(6.334e-5, rel=4 / math.sqrt(2e6 * 6.3e-5))


def test_values_and_noise_lie_on_one_lattice_and_their_sum_is_exact() -> None:
    lattice = Lattice(1.7, seeded(7))
    step = lattice.granularity
    assert math.log2(step) == int(math.log2(step)) and 2**28 <= 1.7 / step < 2**29
    values = np.random.default_rng(0).normal(size=1000) * 50
    noisy = lattice.added(values)
    assert (np.rint(noisy / step) * step == noisy).all()
    assert (noisy - Lattice(1.7, seeded(7)).noise(1000) == np.rint(values / step) * step).all()
    assert np.linalg.norm(np.rint(values / step) * step - values) <= lattice.rounding(1000)


def test_noise_that_is_drawn_in_parts_and_added_in_place_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(25, 40)) * 50
    whole = Lattice(1.7, seeded(7)).added(values)
    assert np.array_equal(Lattice(1.7, seeded(7)).added(values, into=np.empty((25, 40))), whole)
    monkeypatch.setattr("atoll.privacy.noise.NUMBERS_AT_A_TIME", 7)
    before = values.copy()
    assert np.array_equal(Lattice(1.7, seeded(7)).added(values), whole) and np.array_equal(values, before)
    assert Lattice(1.7, seeded(7)).added(values, into=values) is values and np.array_equal(values, whole)


def test_noise_is_added_to_no_copy() -> None:
    with pytest.raises(ValueError, match="into must be contiguous"):
        Lattice(1.7, seeded(7)).added(np.zeros((3, 4)), into=np.zeros((4, 3)).T)


def test_the_lowest_bits_do_not_tell_which_of_two_values_was_hidden() -> None:
    """With plain float noise they do: 0 + noise and 1 + noise have different reachable floats."""
    lattice = Lattice(1.0, entropy)
    for value in (0.0, 1.0, 1 / 3):
        noisy = lattice.added(np.full(10_000, value))
        assert (np.rint(noisy / lattice.granularity) * lattice.granularity == noisy).all()


def test_entropy_never_comes_twice() -> None:
    assert not (entropy(1000) == entropy(1000)).any()


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.inf, math.nan])
def test_noise_of_no_deviation_cannot_be_made(deviation: float) -> None:
    with pytest.raises(ValueError, match="deviation must be finite and > 0"):
        Lattice(deviation, entropy)


@given(st.floats(1e-6, 6e3), st.floats(1e-6, 1e6), st.integers(1, 10**8), st.integers(1, 10**5))
def test_discrete_noise_costs_no_more_than_the_accountant_says(
    multiplier: float, sensitivity: float, numbers: int, shares: int
) -> None:
    """Its grid is so fine that what is counted of its deviation is enough, alone and in shares."""
    lattice = lattice_for(multiplier, sensitivity, numbers, entropy)
    excess = discrete_excess(lattice.variance, 10**12, shares)
    assert excess.noise_factor >= DISCRETE_PART and 2 * excess.slack < 1e-29
    assert lattice.variance >= 4**FINENESS


@given(
    st.floats(0.05, 2000) | st.integers(-3, 6).map(lambda power: 2.0**power * (1 - 1e-7)),
    st.just(1.0) | st.floats(1e-3, 1e3),
    st.integers(1, 10**9),
)
def test_the_noise_covers_what_rounding_on_its_own_grid_adds(
    multiplier: float, sensitivity: float, numbers: int
) -> None:
    """And no more than that: the grid is 2^28 to 2^29 times as fine as the deviation."""
    lattice = lattice_for(multiplier, sensitivity, numbers, entropy)
    step = 2.0 ** (math.floor(math.log2(lattice.deviation)) - 28)
    added = step * math.sqrt(numbers)  # twice half a step for each number
    assert lattice.granularity == step
    assert lattice.deviation == pytest.approx(multiplier * (sensitivity + added), rel=1e-15)


def test_so_much_noise_that_its_rounding_would_grow_with_it_is_refused() -> None:
    assert lattice_for(6710.0, 1.0, 10**8, entropy).deviation > 6710
    with pytest.raises(
        ConfigError, match=r"^privacy.noise_multiplier: 6711 is too much for 100,000,000 numb"
    ):
        lattice_for(6711.0, 1.0, 10**8, entropy)


def test_the_accountant_counts_a_little_less_than_the_noise() -> None:
    """So little that no figure shows it, and none is below the truth."""
    assert DISCRETE_PART < 1
    event = accounting._event(Release(1.0, 1.0))
    assert event.noise_multiplier == DISCRETE_PART
