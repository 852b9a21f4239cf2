"""Draws of single examples: whose they are, what they don't depend on, and that they are random."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.example_draws import (
    _hashed,
    _hashed_there,
    _places,
    example_draws,
    example_numbers,
    example_seeds,
    occurrences,
    seeded_coins,
)
from atoll.client.training.batches import random_numbers
from atoll.errors import ConfigError
from atoll.learning.feature_cache import key_table

STEP = (1, "c", 0)


def keys(text: str) -> list[bytes]:
    return [hashlib.sha256(letter.encode()).digest() for letter in text]


def test_an_equal_that_comes_as_one_more_takes_the_next_occurrence() -> None:
    assert occurrences(key_table(keys("abacab"))).tolist() == [0, 0, 1, 0, 2, 1]
    before, after = example_numbers(keys("aabbc")), example_numbers(keys("aaabbc"))
    assert sorted({*before.tolist()}) == sorted({*after.tolist()} - {after[2]})
    assert len({*after.tolist()}) == 6
    assert len(example_numbers([])) == 0


def test_numbers_do_not_depend_on_where_an_example_stands() -> None:
    there, here = example_numbers(keys("abc")), example_numbers(keys("cxab"))
    assert there.tolist() == [here[2], here[3], here[0]]


def test_equals_have_coins_of_their_own_that_are_as_likely_as_they_should_be() -> None:
    """20,000 throws of two equals: the rates are a quarter, the pairs a sixteenth, to five deviations."""
    coins = seeded_coins(example_numbers(keys("aa")), 20_000, 7, "poisson", 1, "c") < 0.25
    assert abs(float(coins.mean()) - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5
    assert abs(float(coins.all(axis=1).mean()) - 1 / 16) < 5 * (1 / 16 * 15 / 16 / 20_000) ** 0.5


def test_bits_are_even_and_those_of_neighbours_have_nothing_in_common() -> None:
    found = _hashed(example_seeds(example_numbers(keys("abcd")), 3, "x"), (200, 300), torch.device("cpu"))
    uniform = found.numpy() * 2.0**-32
    assert abs(uniform.mean() - 0.5) < 5 / (12 * uniform.size) ** 0.5
    assert abs(uniform.var() * 12 - 1) < 0.01
    table = uniform.reshape(4, 200, 300)
    for one, other in (
        (table[0], table[1]), (table[:, 1:], table[:, :-1]), (table[:, :, 1:], table[:, :, :-1]),
    ):  # fmt: skip
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / one.size**0.5


def test_a_gpus_way_of_mixing_gives_the_same_bits() -> None:
    seeds = example_numbers(keys("abc"))
    mixed = random_numbers(seeds, 1)[:, 0]
    halves = mixed & np.uint64(0xFFFFFFFF), mixed >> np.uint64(32)
    there = _hashed_there(*halves, _places((5, 7)), torch.device("cpu"))
    assert torch.equal(there, _hashed(seeds, (5, 7), torch.device("cpu")))


def test_bits_are_where_they_are_wanted() -> None:
    found = _hashed(example_numbers(keys("abc")), (5, 7), torch.device("meta"))
    assert (found.device.type, found.shape, found.dtype) == ("meta", (3, 35), torch.int64)


def drawn(kind: Any, numbers: Any, **more: Any) -> torch.Tensor:
    with example_draws(numbers, 3, STEP):
        found: torch.Tensor = kind(len(numbers), **more)
    return found


KINDS = {
    "dropout": lambda n: nn.functional.dropout(torch.ones(n, 6, 4), 0.4),
    "channels": lambda n: nn.functional.dropout2d(torch.ones(n, 6, 4, 4), 0.4),
    "rand": lambda n: torch.rand(n, 5),
    "rand_like": lambda n: torch.rand_like(torch.ones(n, 5)),
    "randn": lambda n: torch.randn(n, 5),
    "normal": lambda n: torch.empty(n, 5).normal_(3.0, 2.0),
    "uniform": lambda n: torch.empty(n, 5).uniform_(-1, 1),
    "bernoulli": lambda n: torch.bernoulli(torch.full((n, 50), 0.3)),
    "windows": lambda n: nn.functional.dropout(torch.ones(3 * n, 6), 0.4),
    "attention": lambda n: nn.functional.scaled_dot_product_attention(
        *[torch.eye(6, 4).expand(n, 2, 6, 4)] * 3, dropout_p=0.4
    ),
    "stochastic depth": lambda n: torch.empty(n, 1, 1).bernoulli_(0.5).expand(n, 2, 2).contiguous(),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_for_an_example_is_the_same_in_any_batch(kind: str) -> None:
    many, few = example_numbers(keys("abcdefgh")), example_numbers(keys("hca"))
    whole, part = drawn(KINDS[kind], many), drawn(KINDS[kind], few)
    whole, part = whole.reshape(8, -1), part.reshape(3, -1)
    assert torch.equal(part, whole[[7, 2, 0]])
    assert len({tuple(row.tolist()) for row in whole}) > 1
    with torch.random.fork_rng():
        torch.rand(5)
        assert torch.equal(drawn(KINDS[kind], many).reshape(8, -1), whole)


def test_more_padding_behind_an_example_changes_none_of_its_draws() -> None:
    numbers = example_numbers(keys("ab"))
    short = drawn(lambda n: nn.functional.dropout(torch.ones(n, 3, 5, 5), 0.5), numbers)
    long = drawn(lambda n: nn.functional.dropout(torch.ones(n, 3, 9, 9), 0.5), numbers)
    assert torch.equal(short, long[:, :, :5, :5])


def test_steps_rounds_and_clients_draw_anew() -> None:
    numbers, found = example_numbers(keys("a" * 2)), []
    for step in ((1, "c", 0), (1, "c", 1), (2, "c", 0), (1, "d", 0)):
        with example_draws(numbers, 3, step):
            found += [torch.rand(2, 8), torch.rand(2, 8)]
    assert len({tuple(row.tolist()) for both in found for row in both}) == 16


def test_one_number_for_a_whole_layer_is_alike_for_all_batches() -> None:
    one, other = (drawn(lambda n: torch.rand([]), example_numbers(keys(text))) for text in ("abc", "x"))
    assert torch.equal(one, other)


def test_a_block_that_is_computed_again_draws_as_the_first_time() -> None:
    numbers, layer = example_numbers(keys("abcd")), nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5))
    x = torch.ones(4, 5, requires_grad=True)
    found = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        with example_draws(numbers, 3, STEP):
            found += torch.autograd.grad(forward(forward(x)).sum(), [x])
    assert torch.equal(*found) and not bool((found[0] == 0).all())


def test_maps_over_examples_draw_for_each() -> None:
    layer, x = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)), torch.ones(8, 5)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: Any, one: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, values, (one.unsqueeze(0),)).square().sum()

    def each(n: int) -> torch.Tensor:
        return vmap(grad(loss), in_dims=(None, 0), randomness="different")(values, x[:n])["0.weight"]

    whole, part = (drawn(each, example_numbers(keys(text))) for text in ("abcdefgh", "hca"))
    torch.testing.assert_close(part, whole[[7, 2, 0]])


def test_in_evaluation_nothing_is_drawn() -> None:
    layer = nn.Dropout(0.5).eval()
    assert torch.equal(
        drawn(lambda n: layer(torch.ones(n, 4)), example_numbers(keys("ab"))), torch.ones(2, 4)
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (lambda n: torch.randperm(6), r"draws by aten\.randperm"),
        (lambda n: torch.multinomial(torch.ones(n, 3), 1), r"draws by aten\.multinomial"),
        (lambda n: nn.functional.dropout(torch.ones(7, n), 0.5), r"draws \[7, 3\] numbers by bernoulli_"),
    ],
    ids=["permutation", "categories", "layout"],
)
def test_draws_that_are_no_single_examples_are_refused_by_name(kind: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        drawn(kind, example_numbers(keys("abc")))


def test_without_numbers_of_its_own_no_work_is_drawn() -> None:
    from atoll.client.heads.feature_table import ClientRows
    from atoll.client.heads.train import with_poisson_batches

    how = DpSgd(
        1.0, 1.0, 1.0, lambda client: lambda n: np.zeros(n, np.uint64), lambda c, n: [np.arange(len(n))]
    )
    with pytest.raises(AssertionError, match="belongs to an example"):
        with_poisson_batches(ClientRows("c", np.arange(3)), how)
