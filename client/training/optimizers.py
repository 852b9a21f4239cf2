"""Optimizer steps as single element-wise operations on stacked parameters.

A fused multiply-add rounds once where two operations round twice, and torch fuses in
vectorised loops but not always at their ends; an element's bits would then depend on its
place, that is on how many clients are stacked. Hence no `alpha=` and no `addcmul` here.
The formulas are those of torch.optim's SGD, Adam and AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from atoll.job.job import TrainSection

Step = Callable[[torch.Tensor, torch.Tensor], None]
"""(parameters, gradient): moves the parameters in place, and may overwrite the gradient.

Both may be a prefix of the last call's.
"""

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def is_plain(train: TrainSection) -> bool:
    """Whether a step is the learning rate times the gradient and nothing else."""
    return train.optimizer == "sgd" and not train.momentum and not train.weight_decay


def make_optimizer(train: TrainSection) -> Step:
    """A fresh optimizer for one stacked parameter."""
    if train.optimizer == "sgd":
        return _sgd(train.lr, train.momentum, train.weight_decay)
    return _adam(train.lr, train.weight_decay, decoupled=train.optimizer == "adamw")


def _sgd(lr: float, momentum: float, weight_decay: float) -> Step:
    velocity: list[torch.Tensor] = []

    def step(p: torch.Tensor, g: torch.Tensor) -> None:
        if weight_decay:
            g += p * weight_decay
        if momentum:
            if not velocity:
                velocity.append(torch.zeros_like(p))
            torch.mul(velocity[0][: len(p)].mul_(momentum).add_(g), lr, out=g)
        else:
            g *= lr
        p.sub_(g)

    return step


def _adam(lr: float, weight_decay: float, *, decoupled: bool) -> Step:
    moments: list[torch.Tensor] = []
    taken = 0

    def step(p: torch.Tensor, g: torch.Tensor) -> None:
        nonlocal taken
        taken += 1
        if not moments:
            moments.extend((torch.zeros_like(p), torch.zeros_like(p)))
        if weight_decay and decoupled:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay:
            g = g + p * weight_decay
        m, v = (moment[: len(p)] for moment in moments)
        m.mul_(BETA1).add_(g * (1 - BETA1))
        v.mul_(BETA2).add_((g * g) * (1 - BETA2))
        scale = v.sqrt().div_(math.sqrt(1 - BETA2**taken)).add_(EPSILON)
        p.sub_((m / scale) * (lr / (1 - BETA1**taken)))

    return step


def torch_optimizer(parameters: Any, train: TrainSection) -> torch.optim.Optimizer:
    """The same optimizer of torch, for models that train by autograd."""
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
        )
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=train.lr, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=train.weight_decay)
