"""Gradients of each example by hooks and by functions, and what they leave on a model: nothing."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from atoll.client.dp.per_example_gradients import (
    _reached,
    hooks_suffice,
    nothing_in_place,
    per_example_gradients,
)

BATCH = {"x": torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0], [2.0, 2.0, -1.0]])}
TARGETS = torch.tensor([0, 1, 1])


class Scaled(nn.Module):
    """A layer that Opacus has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Network(nn.Module):
    """A layer, one that works in place, a layer of the caller's, and a parameter that is never used."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.relu, self.middle = nn.Linear(3, 4), nn.ReLU(inplace=True), middle or nn.Identity()
        self.last, self.unused = nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return cast("torch.Tensor", self.last(self.middle(self.relu(self.first(batch["x"])))))


def network(middle: nn.Module | None = None) -> Any:
    return Network(middle)


def left_on(model: nn.Module) -> Any:
    """The names of all that hangs on modules and parameters, and whether layers work in place."""
    modules = {
        name: (sorted(vars(m)), len(m._forward_hooks), len(m._backward_hooks), vars(m).get("inplace"))
        for name, m in model.named_modules()
    }
    return modules, {name: sorted(vars(p)) for name, p in model.named_parameters()}


def one_by_one(model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, list[torch.Tensor]] = {}
    for row in range(len(TARGETS)):
        model.zero_grad()
        outputs = model({"x": BATCH["x"][row : row + 1]})
        cross_entropy(outputs, TARGETS[row : row + 1]).backward()  # type: ignore[no-untyped-call]
        for name, p in model.named_parameters():
            found.setdefault(name, []).append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("middle", [None, Scaled()], ids=["plain", "with a layer of its own"])
@pytest.mark.parametrize("hooks", [True, False])
def test_they_are_those_of_examples_taken_one_by_one_and_leave_nothing_behind(
    middle: nn.Module | None, hooks: bool
) -> None:
    model = network(middle)
    expected, before = one_by_one(model), left_on(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # inputs need no gradient, which is nobody's worry
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        with per_example_gradients(model, cross_entropy, hooks=hooks) as gradients:
            found = gradients(BATCH, TARGETS)
    assert left_on(model) == before
    assert all(p.grad is None for p in model.parameters())
    for name, rows in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(rows)), rows, msg=name)
    assert hooks_suffice(model, cross_entropy, BATCH, TARGETS)
    assert left_on(model) == before


def test_what_the_loss_depends_on_is_neither_what_is_unused_nor_what_has_no_gradient() -> None:
    model = network(Scaled())
    with torch.no_grad():
        model.middle.factor.zero_()  # so that nothing before it has a gradient
    assert _reached(model, cross_entropy, BATCH, TARGETS) == {"middle.factor", "last.bias"}
    with torch.no_grad():
        model.middle.factor.fill_(1.0)
    assert _reached(model, cross_entropy, BATCH, TARGETS) == {
        "first.weight", "first.bias", "middle.factor", "last.weight", "last.bias",
    }  # fmt: skip


class Bypassed(nn.Module):
    """A layer that is never called, and whose weight is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight.T


def test_hooks_do_not_suffice_where_a_parameter_is_used_that_no_hook_sees() -> None:
    assert not hooks_suffice(network(Bypassed()), cross_entropy, BATCH, TARGETS)


def test_layers_work_in_place_again_afterwards_also_after_an_error() -> None:
    model = network()
    before = left_on(model)

    def fail() -> None:
        with nothing_in_place(model):
            assert not model.relu.inplace
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail()
    assert model.relu.inplace and left_on(model) == before


class Seeing(nn.Module):
    """Two convolutions of pictures in channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.last = nn.Linear(6, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        pictures = batch["x"].contiguous(memory_format=torch.channels_last)
        return cast("torch.Tensor", self.last(self.second(self.first(pictures).relu()).mean((2, 3))))


def test_pictures_in_channels_last_layout_have_the_gradients_that_they_have_one_by_one() -> None:
    """Opacus' own rule for convolutions reads other numbers of a picture there."""
    model: Any = Seeing()
    pictures = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(3))
    expected: dict[str, list[torch.Tensor]] = {}
    for row in range(len(TARGETS)):
        loss = cross_entropy(model({"x": pictures[row : row + 1]}), TARGETS[row : row + 1])
        each = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), each, strict=True):
            expected.setdefault(name, []).append(gradient)
    with per_example_gradients(model, cross_entropy, hooks=True) as gradients:
        found = gradients({"x": pictures}, TARGETS)
    torch.testing.assert_close(found, {n: torch.stack(rows) for n, rows in expected.items()})
