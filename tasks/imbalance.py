"""What makes up for classes of which a client has few: weights, focal loss, logit adjustment.

How often each class is there is counted at every client, for itself; nothing of it travels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from protocol.errors import ConfigError
from protocol.job import Job
from tasks.seam import Task

USUAL = {"weights": 1.0, "focal": 2.0, "logits": 1.0}


@dataclass(frozen=True)
class Imbalance:
    """`train.imbalance` and its strength.

    `weights`: an example counts (n / (classes that are there * n_c))^strength.
    `focal`: it counts (1 - p)^strength, p being what its class is given (Lin et al. 2017).
    `logits`: strength * log of the class's share is added to its output in training (Menon et al. 2021,
    "Long-tail learning via logit adjustment"; by each client's own shares: Zhang et al. 2022, "FedLC").
    """

    kind: Literal["weights", "focal", "logits"]
    strength: float

    @classmethod
    def of(cls, job: Job) -> Imbalance | None:
        """What the job asks for."""
        kind, strength = job.train.imbalance, job.train.imbalance_strength
        return None if kind is None else cls(kind, USUAL[kind] if strength is None else strength)

    def weights(self, counts: torch.Tensor) -> torch.Tensor:
        """What an example of each class counts, [..., classes], for how many there are of each.

        1 on average with strength 1; 0 for classes that aren't there.
        """
        there = counts > 0
        even = counts.sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp_min(1)
        return torch.where(there, (even / counts.clamp_min(1)) ** self.strength, 0).to(torch.float32)

    def shifts(self, counts: torch.Tensor) -> torch.Tensor:
        """What is added to each class's output, [..., classes]; a class that isn't there counts as one."""
        shares = (counts + 1) / (counts + 1).sum(-1, keepdim=True)
        return (self.strength * shares.log()).to(torch.float32)

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

        return {"weights": weighted, "focal": focal, "logits": adjusted}[self.kind]


def counts_of(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """How many examples of each class, [classes] in float64."""
    return torch.bincount(targets, minlength=classes).to(torch.float64)


def check_imbalance(job: Job, task: Task) -> None:
    """Raises ConfigError where the task has no classes to balance, or a promise would break."""
    kind = job.train.imbalance
    if kind is None:
        return
    if not (task.on_features and task.head_loss == "softmax"):
        raise ConfigError(f"train.imbalance: {task.name} has no classes to balance, expected none")
    if "example" in job.privacy.units and kind != "focal":
        raise ConfigError(
            f'train.imbalance: expected "focal" under example-level privacy, found "{kind}": by it an'
            " example's gradient depends on how many others there are of its class"
        )
