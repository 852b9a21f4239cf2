"""What a client puts into a secure sum, number by number, against plain arithmetic."""

import numpy as np
import pytest
import torch

from atoll.job.job import Job
from atoll.privacy.dp_plan import DpPlan, dp_plan_of
from atoll.privacy.noise import seeded
from atoll.privacy.secagg_encoding import (
    EXTRA,
    PLAIN_GRANULARITY,
    FixedPointCodec,
    OutOfRange,
    as_bytes,
    as_tensor,
    clipped,
    flat,
    length,
    unflatten,
    weighted,
)
from atoll.protocol.messages import Update
from tests.support.small import image_job

MODEL = {"b": torch.zeros(3), "a": torch.zeros(2, 2)}
NORM = 0.5


def plan() -> DpPlan:
    privacy = {
        "unit": "client", "where": "distributed", "noise_multiplier": 2.0, "delta": 1e-5,
        "clipping_norm": NORM,
    }  # fmt: skip
    job: Job = image_job("raw:pixels", privacy=privacy)
    found = dp_plan_of(job, "client")
    assert found is not None
    return found


@pytest.mark.parametrize("size", [0.0, 1e-310, 0.1, 0.5, 0.75, 1.0, 1e9])
def test_a_contribution_keeps_its_direction_and_is_as_long_as_the_norm_at_most(size: float) -> None:
    numbers = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64) / 5 * size
    expected = numbers.numpy() if size <= NORM else np.array([0.3, -0.4, 0.0])
    assert clipped(numbers, NORM).tolist() == pytest.approx(expected.tolist(), rel=1e-12, abs=0)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_contribution_without_a_length_is_zero(odd: float) -> None:
    """1e300 is a number, but its square isn't."""
    assert clipped(torch.tensor([1.0, odd], dtype=torch.float64), NORM).tolist() == [0.0, 0.0]


def test_tensors_are_laid_out_by_name_and_come_back() -> None:
    tensors = {"b": torch.tensor([5.0, 6.0, 7.0]), "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert flat(tensors).tolist() == [1, 2, 3, 4, 5, 6, 7] and flat(tensors).dtype == torch.float64
    back = unflatten(flat(tensors), MODEL)
    assert {name: t.tolist() for name, t in back.items()} == {n: t.tolist() for n, t in tensors.items()}
    assert (length(MODEL, private=True), length(MODEL, private=False)) == (7, 7 + len(EXTRA))


def test_a_weighted_contribution_ends_with_its_weight_and_its_loss() -> None:
    states = {"train_loss.sum": torch.tensor(1.5), "train_loss.count": torch.tensor(2.0)}
    update = Update("c", 1, {"b": torch.ones(3), "a": torch.full((2, 2), 2.0)}, 4, states)
    assert weighted(update).tolist() == [8, 8, 8, 8, 4, 4, 4, 4, 1.5, 2]


def test_without_noise_numbers_below_two_to_the_31_are_exact_to_two_to_the_minus_32() -> None:
    codec = FixedPointCodec.of(None, 4, 2, seeded(1))
    assert codec.granularity == PLAIN_GRANULARITY == 1 / 4294967296
    values = np.array([0.0, 1 / 3, -5.25, 2.0**31 - 1])
    whole = codec.integers(values).view(np.int64)
    assert whole.tolist() == [round(value * 4294967296) for value in values.tolist()]
    back = codec.values(codec.integers(values))
    assert np.abs(back.numpy() - values).max() <= 2.0**-33


@pytest.mark.parametrize("odd", [2.0**31, -(2.0**31), 3e9, float("nan"), float("inf")])
def test_without_noise_larger_numbers_are_refused(odd: float) -> None:
    codec = FixedPointCodec.of(None, 2, 2, seeded(1))
    with pytest.raises(OutOfRange, match="not finite, or too large"):
        codec.integers(np.array([0.0, odd]))


def test_with_noise_a_share_is_added_so_that_so_many_make_the_whole() -> None:
    """The sum of 4 shares has the deviation noise multiplier times norm, 1; noise is added, not taken."""
    codec = FixedPointCodec.of(plan(), 20_000, 4, seeded(7))
    values = np.full(20_000, 0.25)
    noised = codec.values(codec.integers(values)).numpy() - 0.25
    assert noised.std() == pytest.approx(2.0 * NORM / 2, rel=0.03)
    again = FixedPointCodec.of(plan(), 20_000, 4, seeded(7))
    assert again.lattice is not None
    drawn = again.lattice.whole_noise(20_000) * again.granularity
    assert np.abs(noised - drawn).max() <= again.granularity


def test_bytes_travel_as_they_are() -> None:
    for content in (b"", b"\x00", b"some bytes\xff"):
        tensor = as_tensor(content)
        assert (tensor.dtype, tensor.dim(), as_bytes(tensor)) == (torch.uint8, 1, content)
