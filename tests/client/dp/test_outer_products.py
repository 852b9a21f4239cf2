"""Norms and sums of outer products: how many are in memory, and how they are rounded."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from atoll.client.dp import ghost_norms
from atoll.client.dp.ghost_norms import OuterProducts, _folded, ghost_passes, squared_norms_of

BATCH, INPUTS, OUTPUTS = 5, 6, 3


def linear(positions: int, seed: int = 0) -> OuterProducts:
    draw = torch.Generator().manual_seed(seed)
    inputs, backprops = (torch.randn(BATCH, positions, n, generator=draw) for n in (INPUTS, OUTPUTS))
    return OuterProducts(nn.Linear(INPUTS, OUTPUTS), inputs, backprops)


def looked_up(positions: int) -> OuterProducts:
    draw = torch.Generator().manual_seed(9)
    rows = torch.randint(0, INPUTS, (BATCH, positions), generator=draw)
    backprops = torch.randn(BATCH, positions, OUTPUTS, generator=draw)
    return OuterProducts(nn.Embedding(INPUTS, OUTPUTS), rows, backprops)


def gradient(term: OuterProducts, example: int) -> np.ndarray:
    """One example's, laid out: a sum of outer products, or rows added up where they belong."""
    backprops = term.backprops[example].double().numpy()
    if not term.looks_up:
        return np.einsum("po,pi->oi", backprops, term.inputs[example].double().numpy())
    found = np.zeros((INPUTS, OUTPUTS))
    np.add.at(found, term.inputs[example].numpy(), backprops)
    return found


def longest(term: OuterProducts, example: int) -> float:
    """The sum of the outer products' norms."""
    backprops = np.linalg.norm(term.backprops[example].double().numpy(), axis=1)
    inputs = 1.0 if term.looks_up else np.linalg.norm(term.inputs[example].double().numpy(), axis=1)
    return float((backprops * inputs).sum())


@pytest.mark.parametrize(
    "terms",
    [[linear(4)], [looked_up(4)], [linear(4), linear(2, seed=1)]],
    ids=["linear", "embedding", "two calls"],
)
def test_squared_norms_are_rounded_up_by_the_bound(
    terms: list[OuterProducts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """n u s², with a unit of rounding so large that the bound is seen: n is p² + the weight's two sizes."""
    unit = 2.0**-10
    monkeypatch.setattr(ghost_norms, "ROUNDING", unit)
    found = squared_norms_of(terms).tolist()
    n = sum(term.positions for term in terms) ** 2 + INPUTS + OUTPUTS
    for example, value in enumerate(found):
        exact = float((sum(gradient(term, example) for term in terms) ** 2).sum())
        s = sum(longest(term, example) for term in terms)
        assert value == pytest.approx(exact + n * unit * s**2, rel=1e-9)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_no_more_examples_are_in_memory_than_there_is_room_for(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at least."""
    taken: list[int] = []
    whole = OuterProducts.exact

    def exact(term: OuterProducts, rows: torch.Tensor) -> OuterProducts:
        taken.append(len(rows))
        return whole(term, rows)

    monkeypatch.setattr(OuterProducts, "exact", exact)
    one, other = linear(4), linear(2, seed=1)
    assert one.numbers() == 4 * (INPUTS + OUTPUTS)
    total = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for numbers, use in (
        (one.numbers(), lambda: one.add_to(total, torch.ones(BATCH, dtype=torch.float64))),
        (one.numbers() + other.numbers(), lambda: squared_norms_of([one, other])),
    ):
        taken.clear()
        for given in (room * numbers, room * numbers - 1, 1):
            monkeypatch.setattr(ghost_norms, "NUMBERS_AT_ONCE", given)
            taken.clear()
            use()
            assert max(taken) == max(1, given // numbers), given


def test_laid_out_each_example_has_its_own_sum() -> None:
    for term in (linear(4), looked_up(4)):
        expected = np.stack([gradient(term, example) for example in range(BATCH)])
        np.testing.assert_allclose(term.sample().numpy(), expected, rtol=1e-12)


def test_gradients_are_folded_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghost_norms, "FOLDED", 4)
    found = _folded({"long": torch.arange(9.0).view(3, 3), "short": torch.arange(3.0)})
    assert found["long"].tolist() == [0 + 4 + 8, 1 + 5, 2 + 6, 3 + 7]
    assert found["short"].tolist() == [0, 1, 2]


def test_torch_warns_nobody_of_hooks_that_fire_as_they_should() -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(INPUTS, OUTPUTS)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            found: torch.Tensor = self.layer(batch["x"])
            return found

    batch, targets = {"x": torch.randn(BATCH, INPUTS)}, torch.zeros(BATCH, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ghost_passes(Outputs(), nn.functional.cross_entropy) as passes:
            assert len(passes(batch, targets).squared_norms()) == BATCH
