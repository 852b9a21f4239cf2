"""Optimizer steps as single element-wise operations on stacked parameters.

A fused multiply-add rounds once where two operations round twice, and torch fuses in
vectorised loops but not always at their ends; an element's bits would then depend on its
place, that is on how many clients are stacked. Hence no `alpha=` and no `addcmul` here.
The formulas are those of torch.optim's SGD, Adam, AdamW and RMSprop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from atoll.client.training.learning_rates import LearningRate
from atoll.job.train import TrainSection

Step = Callable[[torch.Tensor, torch.Tensor, LearningRate], None]
"""(parameters, gradient, learning rate): moves the parameters in place, and may overwrite the gradient.

The first two may be a prefix of the last call's.
"""

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
ALPHA = 0.99
"""RMSprop's decay: the weight of the previous mean square."""


def is_plain(train: TrainSection) -> bool:
    """Whether every local step is SGD with the same learning rate, without momentum or weight decay."""
    is_sgd = train.optimizer == "sgd" and not train.momentum and not train.weight_decay
    return is_sgd and train.clip_norm is None and train.layer_decay is None and not train.varies_by_step


def make_optimizer(train: TrainSection) -> Step:
    """A fresh optimizer for one stacked parameter."""
    match train.optimizer:
        case "sgd":
            return _sgd(train.momentum, train.weight_decay)
        case "rmsprop":
            return _rmsprop(train.weight_decay)
    return _adam(train.weight_decay, decoupled=train.optimizer == "adamw")


def _sgd(momentum: float, weight_decay: float) -> Step:
    velocity: list[torch.Tensor] = []

    def step(p: torch.Tensor, g: torch.Tensor, lr: LearningRate) -> None:
        lr = _beside(lr, p)
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


def _adam(weight_decay: float, *, decoupled: bool) -> Step:
    moments: list[torch.Tensor] = []
    taken = 0

    def step(p: torch.Tensor, g: torch.Tensor, lr: LearningRate) -> None:
        nonlocal taken
        taken += 1
        lr = _beside(lr, p)
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


def _rmsprop(weight_decay: float) -> Step:
    squares: list[torch.Tensor] = []

    def step(p: torch.Tensor, g: torch.Tensor, lr: LearningRate) -> None:
        if not squares:
            squares.append(torch.zeros_like(p))
        if weight_decay:
            g = g + p * weight_decay
        mean = squares[0][: len(p)]
        mean.mul_(ALPHA).add_((g * g) * (1 - ALPHA))
        p.sub_((g / mean.sqrt().add_(EPSILON)) * _beside(lr, p))

    return step


def _beside(lr: LearningRate, p: torch.Tensor) -> LearningRate:
    """The clients' learning rates [clients], reshaped to broadcast over the stacked parameter."""
    return lr if isinstance(lr, float) else lr.view(-1, *[1] * (p.dim() - 1))


def clip_stacked(gradient: Sequence[torch.Tensor], clip_norm: float | None) -> None:
    """Scale each client's gradient in place so that its L2 norm, over all tensors, is `clip_norm` at most.

    As torch's `clip_grad_norm_`, but for rounding: a norm is summed in float64 here.
    """
    if clip_norm is None:
        return
    squares = sum(g.flatten(1).square().sum(1, dtype=torch.float64) for g in gradient)
    assert isinstance(squares, torch.Tensor)
    factor = (clip_norm / (squares.sqrt() + 1e-6)).clamp_max(1.0).to(torch.float32)
    for g in gradient:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))


def torch_optimizer(parameters: Any, train: TrainSection, lr: float | None = None) -> torch.optim.Optimizer:
    """The same optimizer of torch, for models that train by autograd; `lr` is the job's unless given."""
    lr = train.lr if lr is None else lr
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=train.momentum, weight_decay=train.weight_decay)
    if train.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            parameters, lr=lr, alpha=ALPHA, eps=EPSILON, weight_decay=train.weight_decay
        )
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=lr, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=train.weight_decay)


def set_step(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply every group's initial learning rate by `factor` for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
