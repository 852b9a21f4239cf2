"""The networks that are trained, in torch, and one local epoch written out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from benchmarks.workload import Workload

HIDDEN = 288
"""Width before the classifier; the small CNN then has 1,202,218 parameters with 10 classes."""


class Trunk(nn.Sequential):
    """The small CNN without its classifier: 32 x 32 x 3 to HIDDEN features."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 8 * 8, HIDDEN),
            nn.ReLU(),
        )


def network_of(workload: Workload) -> nn.Module:
    """A fresh network with torch's own initial values."""
    if workload.network == "linear":
        return nn.Linear(workload.inputs.shape[1], workload.classes)
    return nn.Sequential(*Trunk(), nn.Linear(HIDDEN, workload.classes))


def accuracy(model: nn.Module, workload: Workload) -> float:
    """On the test set."""
    model.eval()
    with torch.inference_mode():
        outputs = [model(part) for part in torch.split(torch.from_numpy(workload.test_inputs), 500)]
    found = torch.cat(outputs).argmax(1)
    return float((found == torch.from_numpy(workload.test_targets)).float().mean())


def train_plainly(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    workload: Workload,
    rng: np.random.Generator,
) -> None:
    """One local epoch of SGD from the model's present values."""
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
    for rows in torch.split(torch.from_numpy(rng.permutation(len(targets))), workload.batch):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(inputs[rows]), targets[rows]))
        optimizer.step()
