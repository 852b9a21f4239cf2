"""pFedMe's client (T. Dinh et al. 2020); `strategies/personal/pfedme.py` has the symbols.

A local step moves w down the envelope's gradient lambda (w - theta), where theta is K steps from w by the
step's own batch. The loss that is reported for a batch is that of w.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from atoll.client.heads.layers import Stack
from atoll.job.extension_options import validated
from atoll.job.job import Job
from atoll.strategies.options import PFedMeOptions

Gradients = Callable[[Stack], tuple[Stack, torch.Tensor]]
"""(stacked heads) to (their gradients by one batch, its losses)."""
Backward = Callable[[int], Iterable[float]]
"""Takes a batch's number, leaves its gradient in the network, and yields the losses of the batch's parts."""


@dataclass(frozen=True)
class MoreauSteps:
    """The constants by which theta follows from w: the paper's lambda, alpha and K."""

    pull: float
    inner_lr: float
    count: int

    @classmethod
    def of(cls, job: Job) -> MoreauSteps | None:
        """The constants of the job's strategy; None unless it is pFedMe."""
        if job.strategy.name != "pfedme":
            return None
        options = validated(PFedMeOptions, job.strategy.options or {}, "strategy.options")
        assert isinstance(options, PFedMeOptions)
        return cls(options.pull, options.inner_lr, options.inner_steps)


def envelope_gradients(stack: Stack, steps: MoreauSteps, gradients: Gradients) -> tuple[Stack, torch.Tensor]:
    """(the gradient lambda (w - theta) of stacked heads w, each client's loss at w) for one batch."""
    theta, first = [matrix.clone() for matrix in stack], None
    for _ in range(steps.count):
        slopes, losses = gradients(theta)
        first = losses if first is None else first
        for t, w, gradient in zip(theta, stack, slopes, strict=True):
            t -= steps.inner_lr * (gradient + steps.pull * (t - w))
    assert first is not None
    return [steps.pull * (w - t) for w, t in zip(stack, theta, strict=True)], first


def envelope_gradient(
    parameters: Mapping[str, torch.nn.Parameter], steps: MoreauSteps, backward: Backward, number: int
) -> list[float]:
    """Leave lambda (w - theta) as the network's gradient, and return the losses at w by part of the batch."""
    w = {name: p.detach().clone() for name, p in parameters.items()}
    losses: list[float] = []
    for count in range(steps.count):
        at_theta = list(backward(number))
        losses = at_theta if count == 0 else losses
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                p.sub_(gradient + steps.pull * (p - w[name]), alpha=steps.inner_lr)
    with torch.no_grad():
        for name, p in parameters.items():
            p.grad = steps.pull * (w[name] - p)
            p.copy_(w[name])
    return losses
