"""LeNet-5 against its equations in NumPy, its sizes, and ways of tuning it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from torch import nn

from atoll.backbones.small_vision import lenet
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate

PUBLISHED_PARAMETERS = 44_426
"""NIID-Bench's SimpleCNNMNIST: 6 (25 + 1) + 16 (150 + 1) + 120 (256 + 1) + 84 (120 + 1) + 10 (84 + 1)."""


def convolved(channels: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """A valid correlation, ReLU, and the largest of each two by two."""
    assert layer.bias is not None
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    made = np.stack(
        [
            sum(correlate2d(x, k, "valid") for x, k in zip(channels, kernels, strict=True)) + b
            for kernels, b in zip(weight, bias, strict=True)
        ]
    )
    height, width = (side // 2 * 2 for side in made.shape[1:])
    halves = made[:, :height, :width].reshape(len(made), height // 2, 2, width // 2, 2)
    return np.maximum(halves.max((2, 4)), 0)


def features(network: nn.Module, picture: np.ndarray) -> np.ndarray:
    """Of one picture [3, side, side]."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    values = picture.mean(0, keepdims=True)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            values = convolved(values, layer)
        else:
            weight, bias = (p.detach().double().numpy() for p in layer.parameters())
            values = np.maximum(weight @ values.ravel() + bias, 0)
    return values


@pytest.mark.parametrize("side", [16, 28, 31])
def test_features_are_those_of_the_equations(side: int) -> None:
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side))
    network = lenet(side, seed=3)
    found = network(pictures).detach().numpy()
    expected = np.stack([features(network, one) for one in pictures.double().numpy()])
    assert expected.max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_it_is_as_large_as_published() -> None:
    body = sum(p.numel() for p in lenet(28, seed=0).parameters())
    assert body + 10 * (84 + 1) == PUBLISHED_PARAMETERS


def test_a_picture_that_is_too_small_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"image_size: atoll:lenet expects 16 or more pixels a side, found 15"
    ):
        lenet(15, seed=0)


@pytest.mark.parametrize("tune", [{"method": "full"}, {"method": "last-k", "layers": 2}, {"method": "lora"}])
def test_it_learns_digits_however_it_is_tuned(tune: dict[str, Any], tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "name": "lenet",
        "seed": 2,
        "task": {"name": "image-classification"},
        "data": {"source": "digits"},
        "backbone": {"name": "atoll:lenet", "weights": "random", "image_size": 16},
        "tune": tune,
        "train": {"lr": 0.01, "optimizer": "adam", "batch_size": 16},
        "federation": {"clients": 3, "rounds": 2},
    }
    result = simulate(Job.parse(table, origin="test"), tmp_path / "out", on_event=ignore_events, report=False)
    first, second = (one["loss"] for one in result.rounds)
    assert second < first
