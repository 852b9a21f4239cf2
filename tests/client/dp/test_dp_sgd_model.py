"""The clipped sum of whole models, its noise and its counts: gradients given as numbers, summed by a loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import atoll.client.dp.dp_sgd_model as module
from atoll.client.dp.adaptive_norms import AdaptiveNorm, ClippingScales
from atoll.client.dp.dp_sgd import CLIP_ROUNDING_MARGIN, DpSgd
from atoll.client.dp.dp_sgd_model import (
    _clipped_norms,
    _Noise,
    clipped_sum,
    ghost_clipped_sum,
    hooks_suffice_for,
)
from atoll.privacy.noise import lattice_for, seeded

TOGETHER = 32
COUNT = 2 * TOGETHER + 7
NORM, DIVISOR = 0.5, 4.0


def private(**more: Any) -> DpSgd:
    return DpSgd(NORM, 1.0, DIVISOR, lambda client: seeded(1), **more)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))


def each_gradient() -> dict[str, torch.Tensor]:
    """Of 71 examples, some within the norm, most over it, one zero and two that aren't finite."""
    draw = torch.Generator().manual_seed(2)
    size = torch.rand(COUNT, generator=draw) * 0.4
    each = {n: torch.randn(COUNT, *p.shape, generator=draw) for n, p in network().named_parameters()}
    each = {n: g * size.view(-1, *[1] * (g.ndim - 1)) for n, g in each.items()}
    for g in each.values():
        g[5] = 0
    each["0.bias"][7, 0], each["1.weight"][40, 1, 0] = math.nan, math.inf
    return each


class Given:
    """Examples whose gradients are given, and of what is left over in a pass more than that."""

    together = TOGETHER

    def __init__(self) -> None:
        self.learner = SimpleNamespace(model=network())
        self.each, self.asked = each_gradient(), list[list[int]]()

    def gradients_of(self, gradients: Any, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        self.asked.append(list(rows))
        return {name: g[list(rows)] for name, g in self.each.items()}

    def passed(self, passes: Any, rows: Sequence[int]) -> Passed:
        self.asked.append(list(rows))
        return Passed({name: torch.cat([g[list(rows)], g[:3]]).double() for name, g in self.each.items()})


class Passed:
    """A pass by ghost norms, of three rows of padding more than asked."""

    def __init__(self, each: dict[str, torch.Tensor]) -> None:
        self.each = each

    def squared_norms(self) -> torch.Tensor:
        return torch.stack([g.flatten(1).square().sum(1) for g in self.each.values()]).sum(0)

    def add_to(self, total: dict[str, torch.Tensor], factors: torch.Tensor) -> None:
        for name, g in self.each.items():
            used = factors > 0
            total[name] += torch.tensordot(factors[used].double(), g[used], dims=1)


def by_hand(each: dict[str, torch.Tensor], rows: Sequence[int], scale: float) -> tuple[Any, int]:
    """(the sum over the rows, one by one in float64; how many were within the norm)."""
    total: dict[str, torch.Tensor] = {n: torch.zeros(g.shape[1:]).double() for n, g in each.items()}
    within = 0
    for row in rows:
        own = {name: g[row].double() for name, g in each.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in own.values())) / scale
        if not math.isfinite(norm):
            continue
        within += norm <= NORM * CLIP_ROUNDING_MARGIN
        factor = min(1.0, NORM * CLIP_ROUNDING_MARGIN / max(norm, 1e-12)) / scale / DIVISOR
        for name, g in own.items():
            total[name] += factor * g
    return total, within


@pytest.mark.parametrize("ghosts", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 0.25, 3.0])
@pytest.mark.parametrize("count", [0, 1, TOGETHER, COUNT])
def test_the_sum_is_that_of_examples_clipped_one_by_one(
    count: int, scale: float | None, ghosts: bool
) -> None:
    rows = np.arange(COUNT)[::-1][:count].copy()
    scales = None
    if scale is not None:
        adaptive = AdaptiveNorm(0.5, 0.2, 1e-9, 4.0, lambda client: seeded(1), begin={"c": scale})
        scales = ClippingScales(adaptive, ["c"], 1)
    given: Any = Given()
    unused: Any = None
    found = (ghost_clipped_sum if ghosts else clipped_sum)(unused, given, rows, private(), scales)
    expected, within = by_hand(given.each, rows.tolist(), scale or 1.0)
    assert {name: t.dtype for name, t in found.items()} == dict.fromkeys(expected, torch.float64)
    for name, total in expected.items():
        torch.testing.assert_close(found[name], total, rtol=2e-6, atol=1e-9)
    assert [row for part in given.asked for row in part] == rows.tolist()
    assert max(map(len, given.asked), default=0) <= TOGETHER
    if scales is not None:
        assert scales._counts == [(within, count)]


def test_a_factor_clips_what_is_over_the_norm_and_leaves_the_rest() -> None:
    norms = torch.tensor([0.0, 0.1, 0.4, 1.0, 1e30, math.inf, math.nan], dtype=torch.float64)
    margin = CLIP_ROUNDING_MARGIN
    for scale in (1.0, 2.0):
        expected = [min(1.0, NORM * margin * scale / max(float(n), 1e-300)) for n in norms[:5]]
        found = _clipped_norms(norms, private(), scale).tolist()
        assert found == pytest.approx([*expected, 0.0, 0.0], rel=1e-12)


def test_noise_is_drawn_over_all_tensors_in_the_order_of_their_names() -> None:
    parameters: Any = {"b": nn.Parameter(torch.zeros(2, 2)), "a": nn.Parameter(torch.zeros(3))}
    noise = _Noise(private(), "c", parameters)
    total = {"b": torch.full((2, 2), 0.25).double(), "a": torch.full((3,), -0.75).double()}
    added = [noise.added(total), noise.added(total)]
    lattice = lattice_for(1.0, NORM / DIVISOR, 7, seeded(1))
    for found in added:  # each step draws on
        flat = lattice.added(np.array([-0.75] * 3 + [0.25] * 4))
        assert found["a"].tolist() == flat[:3].tolist()
        assert found["b"].flatten().tolist() == flat[3:].tolist() and found["b"].shape == (2, 2)
    assert not torch.equal(added[0]["a"], added[1]["a"])


class Looked:
    """A learner that notes how often it is looked at, and with which rows."""

    def __init__(self, *, ghost_norms: bool = False) -> None:
        privacy = SimpleNamespace(ghost_norms=ghost_norms)
        train = SimpleNamespace(device="cpu")
        self.job = SimpleNamespace(privacy=privacy, train=train, seed=1)
        self.objective, self.model = SimpleNamespace(loss=lambda shard: "loss"), "model"
        self.rows: list[Sequence[int]] = []

    def batch(self, shard: Any, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        self.rows.append(list(rows))
        return {"x": torch.zeros(2)}


class Shard:
    """So many examples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def targets_of(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.zeros(len(rows))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What is looked for in a learner, in place of what looks for it; hooks suffice for the first alone."""
    found: list[tuple[str, Any]] = []

    def note(name: str, result: Any = None) -> Any:
        return lambda *given, **named: (found.append((name, named.get("hooks"))), result)[1]

    monkeypatch.setattr(module, "refuse_mixing_layers", note("layers"))
    monkeypatch.setattr(module, "refuse_without_ghost_norms", note("ghosts"))
    monkeypatch.setattr(module, "hooks_suffice", note("hooks", True))
    monkeypatch.setattr(module, "refuse_mixed_examples", note("mixed"))
    monkeypatch.setattr(module, "_in_use", [])
    return found


def test_a_learner_is_looked_at_once_and_the_next_one_again(looks: list[tuple[str, Any]]) -> None:
    one, other = Looked(), Looked()
    learners: list[Any] = [one, one, other, one]
    nothing, some = Shard(0), Shard(5)
    assert not hooks_suffice_for(learners[0], nothing) and not looks
    for learner in learners[:2]:
        assert hooks_suffice_for(learner, some)
    assert looks == [("layers", None), ("hooks", None), ("mixed", True)]
    for learner in learners[2:]:
        assert hooks_suffice_for(learner, some)
    assert len(looks) == 9
    assert one.rows == [[0, 1], [0, 1]]
    alone: Any = Looked()
    assert hooks_suffice_for(alone, Shard(1)) and alone.rows == [[0, 0]]


def test_hooks_that_do_not_suffice_are_not_used(
    looks: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hooks_suffice", lambda *given: False)
    learner: Any = Looked()
    for _ in range(2):
        assert not hooks_suffice_for(learner, Shard(5))
    assert looks == [("layers", None), ("mixed", False)]


def test_ghost_norms_take_hooks_or_are_refused(looks: list[tuple[str, Any]]) -> None:
    learner: Any = Looked(ghost_norms=True)
    assert hooks_suffice_for(learner, Shard(5))
    assert looks == [("layers", None), ("ghosts", None), ("mixed", True)]
