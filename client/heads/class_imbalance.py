"""The losses against class imbalance in closed form, for the heads of many clients at once.

With p the likelihood of an example's class, cross-entropy's derivative in the outputs is e = q - 1[class],
q being the softmax. Weights multiply it; an adjustment moves the outputs before it; the derivative of
-(1 - p)^g log p is e ((1 - p)^g - g p (1 - p)^(g - 1) log p).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from atoll.client.heads.distillation import head_loss
from atoll.client.heads.layers import Loss, identity
from atoll.job.job import Job
from atoll.learning.objective.class_imbalance import Imbalance

_LINE = 64
_CERTAIN = 1e-6
"""The least value of 1 - p, since powers of 0 have no derivative."""


def loss_by_example(job: Job, kind: str) -> Loss:
    """The job's loss without parts that depend on other examples, such as class weights."""
    imbalance = Imbalance.of(job)
    if imbalance is None or imbalance.kind != "focal":
        return smoothed(head_loss(job, kind), job)
    return balanced(head_loss(job, kind), imbalance, torch.zeros(1, 1))


def smoothed(loss: Loss, job: Job) -> Loss:
    """`loss` (softmax) with the job's label smoothing: a part of each target is shared by all classes.

    The target of class c is (1 - s) [c = class] + s / classes (Szegedy et al. 2016, section 7), so that the
    derivative in the outputs is q minus that, and the loss -(1 - s) log q_class - s mean of log q.
    """
    share = job.train.label_smoothing
    if share is None:
        return loss

    def error(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        place, classes = targets.unsqueeze(2), outputs.shape[2]
        right, middle = outputs.gather(2, place).squeeze(2), outputs.mean(dim=2)
        plain, likelihood = loss.grad(outputs, targets)
        surprise = -in_lines(torch.log, likelihood.clamp_min(torch.finfo(torch.float32).tiny))
        plain.scatter_add_(2, place, torch.full_like(right, share).unsqueeze(2))
        return plain.sub_(share / classes), surprise + share * (right - middle)

    return Loss(error, identity)


def balanced(loss: Loss, imbalance: Imbalance, counts: torch.Tensor) -> Loss:
    """`loss` (softmax) corrected for class imbalance, with `counts` [clients, classes] of examples."""
    if imbalance.kind == "weights":
        weights = imbalance.weights(counts)

        def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            error, likelihood = loss.grad(outputs, targets)
            each = weights[: len(outputs)].gather(1, targets)
            return error * each.unsqueeze(2), loss.value(likelihood) * each

        return Loss(weighted, identity)
    if imbalance.kind == "logits":
        shifts = imbalance.shifts(counts).unsqueeze(1)
        return Loss(lambda outputs, targets: loss.grad(outputs + shifts[: len(outputs)], targets), loss.value)
    if imbalance.kind == "focal":
        return Loss(lambda outputs, targets: _focal(loss, imbalance.strength, outputs, targets), identity)
    return loss  # its examples are drawn otherwise, and count as ever


def _focal(
    loss: Loss, strength: float, outputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    error, likelihood = loss.grad(outputs, targets)
    rest = (1 - likelihood).clamp_min(_CERTAIN)
    surprise = -in_lines(torch.log, likelihood.clamp_min(torch.finfo(torch.float32).tiny))
    power = in_lines(lambda t: torch.exp(strength * torch.log(t)), rest)
    factor = power + strength * likelihood * (power / rest) * surprise
    return error * factor.unsqueeze(2), power * surprise


def in_lines(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """A function of single numbers [clients, batch], whose bits don't depend on how many clients there are.

    torch's logarithm has other bits at the end of a tensor, so every client's row is whole lines of memory.
    """
    count = values.shape[1]
    whole = torch.nn.functional.pad(values, (0, -count % _LINE), value=1.0)
    return function(whole)[:, :count]
