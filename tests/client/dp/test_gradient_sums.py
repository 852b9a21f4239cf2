"""A batch's sum of clipped gradients of a head, by autograd example by example, for batches of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.gradient_sums import head_sums
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES
from atoll.protocol.tensors import Tensors
from tests.privacy.watchdogs import head, silent

NORM, DIVISOR = 0.9, 4.0


def by_hand(start: Tensors, features: torch.Tensor, targets: torch.Tensor) -> Tensors:
    total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for x, y in zip(features, targets, strict=True):
        own = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        names = sorted({name.removesuffix("bias").removesuffix("weight") for name in own})
        for place, name in enumerate(names):
            x = own[f"{name}weight"] @ (x if place == 0 else x.relu()) + own[f"{name}bias"]
        torch.nn.functional.cross_entropy(x, y).backward()
        gradients = {name: tensor.grad for name, tensor in own.items()}
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values() if g is not None))
        for name, gradient in gradients.items():
            assert gradient is not None
            total[name] += gradient * min(1.0, NORM / float(norm)) / DIVISOR
    return total


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("batch", [[], [4], [3, 1], [0, 2, 5], [1, 2, 3, 4, 5], range(6)], ids=str)
def test_the_sum_is_that_of_the_batchs_examples_and_of_no_other(batch: list[int], hidden: int | None) -> None:
    """A small batch is padded with the client's first row, which must count for nothing."""
    draw = torch.Generator().manual_seed(8)
    features, targets = torch.randn(9, 7, generator=draw) * 3, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    work = ClientRows("c", np.arange(2, 8), np.arange(6, dtype=np.uint64))
    private = DpSgd(
        NORM, 0.0, DIVISOR, lambda client: silent, lambda client, numbers: [np.array(batch, np.int64)]
    )
    start = head(hidden)
    ((client, found),) = head_sums(
        start, FeatureTable.of(features, targets), [work], LOSSES["softmax"], private
    )
    rows = torch.tensor([2 + place for place in batch], dtype=torch.int64)
    expected = by_hand(start, features[rows], targets[rows])
    assert client == "c" and found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=3e-5, atol=1e-6)
