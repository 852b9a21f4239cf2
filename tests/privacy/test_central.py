"""Client-level noise at the server: the bound, the noise, and what must change nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atoll.errors import BudgetExhausted
from atoll.privacy.accounting import Release
from atoll.privacy.banded import CorrelatedNoise
from atoll.privacy.central import CentralGaussian
from atoll.privacy.clipping import clipped_sum
from atoll.privacy.noise import entropy, seeded
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from tests.privacy.detectors import silent

MODEL: Tensors = {"b": torch.zeros(3), "a": torch.zeros(2, 2)}


def update(client: str, values: list[float], num_examples: int = 1) -> Update:
    delta = {"a": torch.tensor(values[:4]).reshape(2, 2), "b": torch.tensor(values[4:7])}
    return Update(client, 1, delta, num_examples)


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])


def mechanism(seed: int = 1, **changes: float) -> CentralGaussian:
    return replace(CentralGaussian(1.0, 1.0, 4.0, 0.5, seeded(seed)), **changes)  # type: ignore[arg-type]


finite = st.floats(-1e6, 1e6, width=32)
anything = st.one_of(finite, st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, 1e38]))


def test_a_sum_is_clipped_over_all_tensors_together_by_hand() -> None:
    # Norms 5 (3, 4 in two tensors) and .5; clipped to 1: (.6, .8) + (0, .5).
    total, norms = clipped_sum(
        [update("x", [3, 0, 0, 0, 4, 0, 0]), update("y", [0, 0, 0, 0, 0.5, 0, 0])], clipping_norm=1.0
    )
    assert norms.tolist() == [5.0, 0.5]
    torch.testing.assert_close(total, torch.tensor([0.6, 0, 0, 0, 1.3, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_clipping_norm_that_is_none_is_refused(norm: float) -> None:
    with pytest.raises(ValueError, match="must be finite and > 0"):
        clipped_sum([update("a", [1.0] * 7)], clipping_norm=norm)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(anything, min_size=7, max_size=7), min_size=1, max_size=5), st.floats(1e-3, 1e3))
def test_no_client_moves_the_sum_by_more_than_the_clipping_norm(
    values: list[list[float]], norm: float
) -> None:
    updates = [update(f"c{i}", v, num_examples=10**i) for i, v in enumerate(values)]
    with_it, _ = clipped_sum(updates, clipping_norm=norm)
    without, _ = clipped_sum(updates[:-1], clipping_norm=norm) if len(updates) > 1 else (None, None)
    before = torch.zeros(7, dtype=torch.float64) if without is None else without
    assert bool(torch.isfinite(with_it).all())
    assert float((with_it - before).norm()) <= norm * (1 + 1e-9)


def test_weights_by_examples_have_no_place_here() -> None:
    one = clipped_sum([update("x", [1, 2, 3, 4, 5, 6, 7], 1)], clipping_norm=1.0)[0]
    many = clipped_sum([update("x", [1, 2, 3, 4, 5, 6, 7], 1_000_000)], clipping_norm=1.0)[0]
    assert torch.equal(one, many)


@pytest.mark.parametrize("dropped", [0, 2, 3, 4])
def test_noise_is_the_same_however_many_answer(dropped: int) -> None:
    """The deviation of the mean is z C / (expected cohort), at every rate of dropping out."""
    wide: Tensors = {"w": torch.zeros(250_000)}
    updates = [Update(f"c{i}", 1, {"w": torch.zeros(250_000)}, 1) for i in range(4 - dropped)]
    mean, _ = mechanism(noise_multiplier=1.5, clipping_norm=0.4).release(updates, wide)
    assert float(mean["w"].std()) == pytest.approx(1.5 * 0.4 / 4, rel=0.006)
    assert abs(float(mean["w"].mean())) < 5 * 0.15 / 500


def test_the_divisor_is_the_expected_cohort_and_not_who_answered() -> None:
    quiet = mechanism(noise_multiplier=1e-9)
    alone = [update("x", [0.5, 0, 0, 0, 0, 0, 0])]
    mean, _ = quiet.release(alone, MODEL)
    assert float(mean["a"][0, 0]) == pytest.approx(0.5 / 4, rel=1e-6)


def test_what_is_spent_is_recorded_before_the_noise_is_drawn() -> None:
    events: list[object] = []

    def words(count: int) -> NDArray[np.uint64]:
        events.append("noise")
        return entropy(count)

    CentralGaussian(1.0, 1.3, 4.0, 0.25, words, record=events.append).release([], MODEL)
    assert events[0] == Release(1.3, 0.25)
    assert set(events[1:]) == {"noise"}  # what the sampler rejects is drawn again


def test_where_the_charge_is_refused_nothing_is_released() -> None:
    def refuse(cost: Release) -> None:
        raise BudgetExhausted("spent")

    def words(count: int) -> NDArray[np.uint64]:
        raise AssertionError("noise was drawn")

    with pytest.raises(BudgetExhausted):
        CentralGaussian(1.0, 1.3, 4.0, 0.25, words, record=refuse).release([], MODEL)


def test_releases_differ_from_round_to_round_and_from_tensor_to_tensor() -> None:
    draw = CentralGaussian(1.0, 1.0, 4.0, 0.5, entropy)
    wide: Tensors = {"u": torch.zeros(20_000), "v": torch.zeros(20_000)}
    one, two = draw.release([], wide)[0], draw.release([], wide)[0]
    for a, b in ((one["u"], one["v"]), (one["u"], two["u"]), (one["v"], two["v"])):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / 20_000**0.5


def test_the_order_of_arrival_and_of_names_changes_no_bit() -> None:
    updates = [update("x", [3, 0, 1, 0, 4, 0, 0]), update("y", [0, 0, 0, 0, 0.5, 0, 0])]
    reordered = {name: MODEL[name] for name in ("a", "b")}
    first, again = mechanism().release(updates, MODEL)[0], mechanism().release(updates, reordered)[0]
    assert torch.equal(flat(first), flat(again))


@pytest.mark.parametrize("field", ["clipping_norm", "noise_multiplier", "expected_cohort", "sampling_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_mechanism_that_protects_nothing_cannot_be_made(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        mechanism(**{field: value})


@pytest.mark.parametrize("rate", [-0.1, 0.0, 1.0001, 1.5, math.nan])
def test_a_sampling_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"sampling_rate must be in \(0, 1\]"):
        mechanism(sampling_rate=rate)


def test_the_fraction_is_that_of_the_norms_within_the_clipping_norm_and_a_half_of_nobody() -> None:
    silent_one = replace(mechanism(count_deviation=2.0), random_bits=silent)
    norms = (0.5, 1.0, 2.0)  # the second is just within
    updates = [update(f"c{norm}", [0, norm, 0, 0, 0, 0, 0]) for norm in norms]
    assert silent_one.release(updates, MODEL)[1] == (2 - 1.5) / 4 + 0.5
    assert silent_one.release([], MODEL)[1] == 0.5
    assert mechanism().release(updates, MODEL)[1] is None


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("count_deviation", [None, 2.0])
def test_the_sums_noise_covers_rounding_in_every_round_of_a_participation(
    bands: int, count_deviation: float | None
) -> None:
    one = replace(
        mechanism(noise_multiplier=1.3, clipping_norm=0.7), count_deviation=count_deviation,
        correlation=CorrelatedNoise(bands),
    )  # fmt: skip
    left = 1.3 if count_deviation is None else (1.3**-2 - (2 * 2.0) ** -2) ** -0.5
    step = 2.0 ** (math.floor(math.log2(left * 0.7)) - 28)
    expected = left * (0.7 + step * math.sqrt(bands * 10**6))
    assert one.lattice(10**6).deviation == pytest.approx(expected, rel=1e-13)
