"""The bits of examples' draws, number by number in Python's own integers: they are the same everywhere."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import atoll.client.dp.example_draws as module
from atoll.client.dp.example_draws import (
    ExampleDraws,
    _hashed,
    _is_draw,
    _places,
    example_numbers,
    example_seeds,
    example_variation,
    example_views,
    seeded_coins,
)
from atoll.client.training.batches import GOLDEN, random_numbers
from atoll.protocol.random_streams import stream_seed
from tests.support.small import image_job

LOW = 0xFFFFFFFF
KEYS = [bytes([letter, *range(31)]) for letter in b"abcab"]


def random_number(seed: int) -> int:
    return int(random_numbers(np.array([seed], dtype=np.uint64), 1)[0, 0])


def place_of(coordinates: tuple[int, ...]) -> int:
    return sum(c * (random_number(axis) & LOW | 1) for axis, c in enumerate(coordinates)) & LOW


def bits_of(seed: int, coordinates: tuple[int, ...]) -> int:
    """Murmur3's last step on the element's number, with the seed's two halves added on the way."""
    mixed = random_number(seed)
    x = (place_of(coordinates) + (mixed & LOW)) & LOW
    x ^= x >> 16
    x = x * 0x85EBCA6B & LOW
    x ^= mixed >> 32
    x ^= x >> 13
    x = x * 0xC2B2AE35 & LOW
    return x ^ x >> 16


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 5)])
def test_an_elements_bits_follow_from_the_seed_and_its_coordinates(shape: tuple[int, ...]) -> None:
    seeds = np.array([0, 5, 2**63 + 11], dtype=np.uint64)
    elements = list(itertools.product(*map(range, shape)))
    assert _places(shape).tolist() == [place_of(c) for c in elements]
    found = _hashed(seeds, shape, torch.device("cpu"))
    assert (found.dtype, found.shape) == (torch.int64, (3, len(elements)))
    assert found.tolist() == [[bits_of(int(seed), c) for c in elements] for seed in seeds]


@pytest.mark.parametrize("block", [1, 5, 12, 1 << 16])
def test_how_many_numbers_are_mixed_together_changes_none(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = np.arange(9, dtype=np.uint64)
    expected = _hashed(seeds, (2, 3), torch.device("cpu"))
    monkeypatch.setattr(module, "NUMBERS_PER_BLOCK", block)
    assert torch.equal(_hashed(seeds, (2, 3), torch.device("cpu")), expected)


def test_an_examples_number_is_hashed_from_its_content_and_its_count_among_equals() -> None:
    counts = [0, 0, 0, 1, 1]
    content = [int.from_bytes(key[:8], "little") for key in KEYS]
    expected = [random_number((c + int(GOLDEN) * n) % 2**64) for c, n in zip(content, counts, strict=True)]
    assert example_numbers(KEYS).tolist() == expected


def test_seeds_coins_and_views_are_those_of_the_purpose() -> None:
    numbers, job = example_numbers(KEYS), image_job("raw:pixels")
    seeds = example_seeds(numbers, 3, "x", 1)
    assert seeds.tolist() == [random_number(int(n) ^ stream_seed(3, "x", 1)) for n in numbers]
    coins = seeded_coins(numbers, 4, 3, "x", 1)
    assert coins.shape == (4, 5) and coins.min() >= 0 and coins.max() < 1 and len({*coins.ravel()}) == 20
    views = example_views(numbers, 3, job, (2, "c", 1))
    drawn = example_seeds(numbers, job.seed, "view", 2, "c", 1)
    assert views.tolist() == [int(seed) % 3 for seed in drawn]


def test_each_example_is_augmented_from_a_generator_of_its_own() -> None:
    numbers = example_numbers(KEYS)
    assert example_variation(numbers, image_job("raw:pixels"), (1, "c", 0)) is None
    job = image_job("raw:pixels", train={"augment": ["flip"]})
    variation = example_variation(numbers, job, (1, "c", 0))
    assert variation is not None and variation.names == ("flip",)
    seeds = example_seeds(numbers, job.seed, "augment", 1, "c", 0)
    assert [variation.stream(place).initial_seed() for place in range(5)] == [int(s) >> 1 for s in seeds]


SEEDS = np.array([3, 2**40 + 1], dtype=np.uint64)


def bits_in(shape: tuple[int, ...], draws: int = 1) -> list[list[int]]:
    """Of the last of so many draws for two examples, [2, elements]; `shape` is one example's part."""
    torch.manual_seed(8)
    number = 0
    for _ in range(draws):
        number = int(torch.empty((), dtype=torch.int64).random_())
    elements = list(itertools.product(*map(range, shape)))
    return [[bits_of(int(seed) ^ number, c) for c in elements] for seed in SEEDS]


def drawn(kind: Any) -> torch.Tensor:
    torch.manual_seed(8)
    with ExampleDraws(SEEDS):
        found: torch.Tensor = kind()
    return found


def quantile(bits: int) -> float:
    return float(torch.special.ndtri(torch.tensor((bits + 0.5) / 2**32, dtype=torch.float64)))


def flat(values: Any) -> list[float]:
    return [float(v) for row in values for v in row]


def test_uniform_and_normal_numbers_are_made_of_the_bits() -> None:
    bits = bits_in((3,))
    uniform = [[(b >> 8) * 2.0**-24 for b in row] for row in bits]
    normal = [[quantile(b) for b in row] for row in bits]
    two = torch.empty(2, 3)
    for kind in (
        lambda: torch.rand(2, 3),
        lambda: torch.rand_like(two),
        lambda: torch.empty(2, 3).uniform_(),
    ):
        assert flat(drawn(kind).tolist()) == flat(uniform)
    for kind in (
        lambda: torch.randn(2, 3),
        lambda: torch.randn_like(two),
        lambda: torch.empty(2, 3).normal_(),
    ):
        assert flat(drawn(kind).tolist()) == pytest.approx(flat(normal), rel=1e-6, abs=1e-6)
    shifted = drawn(lambda: torch.empty(2, 3).uniform_(-3, 5))
    assert flat(shifted.tolist()) == pytest.approx([-3 + 8 * u for u in flat(uniform)], rel=1e-6)
    scaled = drawn(lambda: torch.empty(2, 3).normal_(2.0, 0.5))
    assert flat(scaled.tolist()) == pytest.approx([2 + 0.5 * n for n in flat(normal)], rel=1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_is_dropped_is_what_its_bits_say_and_the_rest_is_scaled(p: float) -> None:
    bits = bits_in((40,))
    kept = [[b < int((1 - p) * 2.0**32) for b in row] for row in bits]
    x = torch.arange(1.0, 81).view(2, 40)
    found, mask = drawn(lambda: torch.native_dropout(x, p, True))  # type: ignore[misc]
    assert mask.tolist() == kept
    torch.testing.assert_close(found, x * torch.tensor(kept) / (1 - p))
    assert torch.equal(drawn(lambda: nn.functional.dropout(x, p)) != 0, torch.tensor(kept))
    chosen = [[b < int(p * 2.0**32) for b in row] for row in bits]
    assert drawn(lambda: torch.empty(2, 40).bernoulli_(p)).bool().tolist() == chosen
    half = drawn(lambda: torch.empty(2, 40).bernoulli_()).bool().tolist()
    assert half == [[b < 2**31 for b in row] for row in bits]
    table = torch.full((2, 40), p)
    each = drawn(lambda: torch.bernoulli(table))
    uniform = [[(b >> 8) * 2.0**-24 < table[0, 0].item() for b in row] for row in bits]
    assert each.bool().tolist() == uniform and each.dtype == torch.float32


def test_all_or_nothing_is_dropped_without_a_number_that_is_none() -> None:
    x = torch.ones(2, 5)
    for p, train, kept in ((0.0, True, 1.0), (1.0, True, 0.0), (0.4, False, 1.0)):
        found, mask = drawn(lambda p=p, train=train: torch.native_dropout(x, p, train))  # type: ignore[misc]
        assert found.tolist() == (x * kept).tolist() and mask.dtype == torch.bool
        assert bool(mask.all()) == bool(kept)


def test_every_draw_takes_the_next_number_and_windows_belong_to_their_example() -> None:
    torch.manual_seed(8)
    with ExampleDraws(SEEDS):
        torch.rand(2, 3)
        second = torch.rand(2, 3)
        third = torch.rand(6, 2)
    assert flat(second.tolist()) == flat([[(b >> 8) * 2.0**-24 for b in row] for row in bits_in((3,), 2)])
    windows = [[(b >> 8) * 2.0**-24 for b in row] for row in bits_in((3, 2), 3)]
    assert third.flatten().tolist() == flat(windows)


def test_a_number_for_all_alike_is_of_no_examples_seed() -> None:
    torch.manual_seed(8)
    number = int(torch.empty((), dtype=torch.int64).random_())
    for shape in ((), (1,), (1, 1)):
        found = drawn(lambda shape=shape: torch.rand(shape))
        assert found.shape == shape
        assert float(found) == (bits_of(number, ()) >> 8) * 2.0**-24


def test_attention_that_drops_nothing_draws_nothing_wherever_the_argument_stands() -> None:
    q = torch.randn(2, 1, 3, 4)
    expected = nn.functional.scaled_dot_product_attention(q, q, q)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    with ExampleDraws(SEEDS):
        given = nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.0)
        placed = nn.functional.scaled_dot_product_attention(q, q, q, None, 0.0)
        default = nn.functional.scaled_dot_product_attention(q, q, q)
    for found in (given, placed, default):
        torch.testing.assert_close(found, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_draws_is_told_from_what_does_not_also_when_asked_again() -> None:
    for _ in range(2):
        assert _is_draw(torch.ops.aten.bernoulli_.float)
        assert not _is_draw(torch.ops.aten.add.Tensor)
    assert math.isclose(float(drawn(lambda: torch.ones(2) + 1)[0]), 2.0)


class Ends(ExampleDraws):
    """Whose bits are the least and the greatest that there are."""

    def bits(self, like: torch.Tensor, name: str) -> torch.Tensor:
        return torch.tensor([0, LOW])


def test_the_ends_of_the_bits_give_numbers_within_their_bounds() -> None:
    like, draws = torch.empty(2), Ends(SEEDS)
    low, high = draws.normal(like, "").tolist()
    assert low == quantile(0) and high == quantile(LOW) and math.isfinite(low) and math.isfinite(high)
    assert draws.uniform(like, "").tolist() == [0.0, 1 - 2.0**-24]
    for certain in (0.0, torch.zeros(2)):
        assert draws.below(like, certain, "").tolist() == [False, False]
    for certain in (1.0, torch.ones(2)):
        assert draws.below(like, certain, "").tolist() == [True, True]


def test_what_else_a_draw_is_given_counts_but_for_a_generator() -> None:
    plain = drawn(lambda: torch.rand(2, 3))
    double = drawn(lambda: torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    assert double.dtype == torch.float64 and double.tolist() == plain.tolist()
