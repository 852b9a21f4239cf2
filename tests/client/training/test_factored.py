"""SGD by factors of a gradient: the steps that torch's SGD takes, whatever a layer is used for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

from atoll.client.training import factored_sgd as module
from atoll.client.training.factored_sgd import outer_product_sgd
from atoll.job.job import Job
from tests.support.small import image_job

LR = 0.1
INPUTS = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Shared(nn.Module):
    """One layer used twice, and its weight a third time by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(300, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.layer(torch.tanh(self.layer(x))), self.layer.weight)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(300, 300), nn.Linear(300, 300, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Words(nn.Module):
    """Inputs of three dimensions, as sentences are; the last layer is small and has its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(100, 700), nn.GELU(), nn.Linear(700, 100), nn.Linear(100, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.reshape(2, 9, 100)).mean(1)


def job_of(**train: object) -> Job:
    return image_job("squeezenet1_1", train={"lr": LR, "batch_size": 8} | train)


def by_torch(model: nn.Module, inputs: torch.Tensor, steps: int = 4) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return model


def by_factors(model: nn.Module, inputs: torch.Tensor, job: Job, mu: float = 0.0) -> tuple[nn.Module, int]:
    """The same, and how many pairs of factors the first step had."""
    optimizer, pairs = torch.optim.SGD(model.parameters(), lr=LR), []
    with outer_product_sgd(model, job, has_terms=bool(mu)) as factors:
        for _ in range(4):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            pairs.append(sum(len(f.pairs) for f in factors))
            optimizer.step()
            for weight in factors:
                weight.step(LR)
    return model, pairs[0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300, bias=False)), 2),
        (lambda: nn.Sequential(nn.Linear(300, 250), nn.ReLU(), nn.Linear(250, 4)), 1),
        (Shared, 2),
        (Tied, 2),
        (Words, 2),
    ],
    ids=["two layers", "one is small", "shared", "tied", "words"],
)
def test_the_steps_are_those_of_torch(make: Callable[[], nn.Module], expected: int) -> None:
    model = make()
    plain = by_torch(deepcopy(model), INPUTS)
    first = deepcopy(model.state_dict())
    found, pairs = by_factors(model, INPUTS, job_of())
    assert pairs == expected
    for name, value in plain.state_dict().items():
        assert not torch.equal(value, first[name])
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_a_layer_of_many_rows_has_its_gradient_and_torchs_very_bits() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))
    many = torch.randn(150, 300)  # 150 rows of 300 and 300 are as much as 300 by 300
    plain = by_torch(deepcopy(model), many)
    found, pairs = by_factors(model, many, job_of())
    assert pairs == 0
    assert all(torch.equal(found.state_dict()[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("train", "mu"),
    [
        ({"momentum": 0.9}, 0.0),
        ({"weight_decay": 0.1}, 0.0),
        ({"optimizer": "adam"}, 0.0),
        ({"precision": "bf16"}, 0.0),
        ({"accumulate": 2}, 0.0),
        ({"checkpoint_activations": True}, 0.0),
        ({}, 0.1),
    ],
    ids=str,
)
def test_whatever_needs_a_gradient_gets_it(train: dict[str, object], mu: float) -> None:
    model = nn.Linear(300, 300)
    assert by_factors(model, INPUTS, job_of(**train), mu)[1] == 0


def test_frozen_layers_and_other_classes_are_left_alone_and_all_is_as_before_afterwards() -> None:
    model = nn.Sequential(
        nn.Linear(300, 300).requires_grad_(False), nn.Bilinear(300, 300, 2), nn.Linear(300, 300)
    )
    with outer_product_sgd(model, job_of(), has_terms=False) as factors:
        assert [f.weight is model[2].weight for f in factors] == [True]
        assert ["forward" in vars(layer) for layer in model] == [False, False, True]
    assert not any("forward" in vars(layer) for layer in model)


def test_the_weights_move_after_the_backward_pass_only() -> None:
    model = nn.Linear(300, 300)
    before = model.weight.detach().clone()
    with outer_product_sgd(model, job_of(), has_terms=False) as factors:
        model(INPUTS).sum().backward()
        assert model.weight.grad is None and model.bias.grad is not None
        assert torch.equal(model.weight, before)
        factors[0].step(LR)
        assert not torch.equal(model.weight, before) and not factors[0].pairs


def test_layers_below_the_limit_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 300 * 300 + 1)
    with outer_product_sgd(nn.Linear(300, 300), job_of(), has_terms=False) as factors:
        assert factors == []
