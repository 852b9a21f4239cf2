"""Corrections for class imbalance at a client: class weights, focal loss, logit adjustment, sampling.

Each client counts its own classes; the counts never leave the client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.tasks.task import Task

DEFAULT_STRENGTH = {"weights": 1.0, "focal": 2.0, "logits": 1.0, "sampling": 1.0}


@dataclass(frozen=True)
class Imbalance:
    """The method of `train.imbalance` and its strength.

    `weights`: an example has the weight (n / (number of present classes * n_c))^strength.
    `focal`: it has the weight (1 - p)^strength, p being the probability of its class (Lin et al. 2017).
    `logits`: strength * log of the class's share is added to its output in training (Menon et al. 2021,
    "Long-tail learning via logit adjustment"; by each client's own shares: Zhang et al. 2022, "FedLC").
    `sampling`: an epoch draws n of the n examples with replacement, one of class c with a probability
    proportional to n_c^-strength; with strength 1 all classes are drawn equally often.
    """

    kind: Literal["weights", "focal", "logits", "sampling"]
    strength: float

    @classmethod
    def of(cls, job: Job) -> Imbalance | None:
        """The job's correction; None where it has none."""
        kind, strength = job.train.imbalance, job.train.imbalance_strength
        return None if kind is None else cls(kind, DEFAULT_STRENGTH[kind] if strength is None else strength)

    def weights(self, counts: torch.Tensor) -> torch.Tensor:
        """The weight of an example of each class, [..., classes], given the counts of examples per class.

        With strength 1 it is 1 on average over examples; it is 0 for absent classes.
        """
        there = counts > 0
        even = counts.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(there, (even / counts.clamp_min(1)) ** self.strength, 0).to(torch.float32)

    def shifts(self, counts: torch.Tensor) -> torch.Tensor:
        """The number added to each class's output, [..., classes]; an absent class counts as one example."""
        shares = (counts + 1) / (counts + 1).sum(-1, keepdim=True)
        return (self.strength * shares.log()).to(torch.float32)

    def chances(self, targets: torch.Tensor) -> NDArray[np.float64] | None:
        """The probability of each example in a draw, [n], given classes [n]; None except for `sampling`."""
        if self.kind != "sampling":
            return None
        if not len(targets):
            return np.empty(0)
        counts = counts_of(targets, int(targets.max()) + 1)
        each: NDArray[np.float64] = (counts[targets] ** -self.strength).numpy()
        each /= each.sum()
        return each

    def loss(self, counts: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The mean over examples of outputs [n, classes] with targets [n], at a client with these counts."""

        def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            each = nn.functional.cross_entropy(outputs, targets, reduction="none")
            return (each * self.weights(counts).to(outputs)[targets]).mean()

        def focal(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            each = nn.functional.cross_entropy(outputs, targets, reduction="none")
            return ((1 - torch.exp(-each)) ** self.strength * each).mean()

        def adjusted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs + self.shifts(counts).to(outputs), targets)

        known = {"weights": weighted, "focal": focal, "logits": adjusted}
        return known.get(self.kind, nn.functional.cross_entropy)


def counts_of(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """The number of examples of each class, [classes], float64."""
    return torch.bincount(targets, minlength=classes).to(torch.float64)


def check_imbalance(job: Job, task: Task) -> None:
    """Raises ConfigError where the task has no classes to balance, or a promise would break."""
    kind = job.train.imbalance
    if kind is None:
        return
    if not (task.uses_pooled_features and task.head_loss == "softmax"):
        raise ConfigError(f"train.imbalance: {task.name} has no classes to balance, expected none")
    if "example" in job.privacy.units and kind != "focal":
        raise ConfigError(
            f'train.imbalance: expected "focal" under example-level privacy, found "{kind}": by it an'
            " example's gradient depends on how many others there are of its class"
        )


def check_smoothing(job: Job, task: Task) -> None:
    """Raises ConfigError where the task has no classes whose labels could be smoothed, or not so."""
    if job.train.label_smoothing is None:
        return
    if not (task.uses_pooled_features and task.head_loss == "softmax"):
        raise ConfigError(f"train.label_smoothing: {task.name} has no labels to smooth, expected none")
    if job.train.teacher is not None:
        raise ConfigError("train.label_smoothing: a teacher's answers are soft already, expected none")
    if job.train.imbalance not in (None, "sampling"):
        raise ConfigError(
            f'train.label_smoothing: it goes with imbalance = "sampling" or none, found'
            f' "{job.train.imbalance}", which changes the same loss'
        )
