"""The loss by a teacher's soft answers in closed form, for the heads of many clients at once.

With q the student's softmax at temperature T and p the teacher's, the derivative of T^2 KL(p, q) in the
outputs is T (q - p) (Hinton et al. 2015, section 2.1).
"""

from __future__ import annotations

import torch

from atoll.client.heads.layers import LOSSES, Loss, identity
from atoll.job.job import Job


def head_loss(job: Job, kind: str) -> Loss:
    """The loss of this kind, mixed with the teacher's where the job has a teacher."""
    if job.train.teacher is None:
        return LOSSES[kind]
    return distillation_loss(LOSSES[kind], job.train.temperature, job.train.distillation_weight)


def distillation_loss(loss: Loss, temperature: float, weight: float) -> Loss:
    """`loss` (softmax) mixed with the teacher's, `weight` being the teacher's part.

    Targets are [clients, batch, 1 + classes]: the class, then the teacher's probabilities at the temperature.
    """

    def error(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        soft = targets[:, :, 1:]
        cooled = (outputs / temperature).transpose(1, 2).contiguous()
        student = torch.softmax(cooled, dim=1).transpose(1, 2)
        hard, likelihood = loss.grad(outputs, targets[:, :, 0].to(torch.int64))
        tiny = torch.finfo(torch.float32).tiny
        apart = (soft * (soft.clamp_min(tiny).log() - student.clamp_min(tiny).log())).sum(2)
        value = loss.value(likelihood) * (1 - weight) + apart * (weight * temperature**2)
        return hard * (1 - weight) + (student - soft) * (weight * temperature), value

    return Loss(error, identity)
