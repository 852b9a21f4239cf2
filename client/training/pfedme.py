"""pFedMe's client (T. Dinh et al. 2020); `strategies/personal/pfedme.py` has the symbols.

A local step moves w down the envelope's gradient lambda (w - theta), where theta is K steps from w by the
step's own batch. The loss that is told of a batch is that of w, before any of them.
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
"""Leaves the gradient of a batch, by its number, in a network; the losses of the batch's parts."""


@dataclass(frozen=True)
class MoreauSteps:
    """How theta comes from w: the paper's lambda, alpha and K."""

    pull: float
    inner_lr: float
    count: int

    @classmethod
    def of(cls, job: Job) -> MoreauSteps | None:
        """Those of the job's strategy; None where gradients are the loss's own."""
        if job.strategy.name != "pfedme":
            return None
        options = validated(PFedMeOptions, job.strategy.options or {}, "strategy.options")
        assert isinstance(options, PFedMeOptions)
        return cls(options.pull, options.inner_lr, options.inner_steps)


def envelope_gradients(stack: Stack, steps: MoreauSteps, gradients: Gradients) -> tuple[Stack, torch.Tensor]:
    """(lambda (w - theta) of stacked heads w, each client's losses of w by the batch)."""
    theta, first = [matrix.clone() for matrix in stack], None
    for _ in range(steps.count):
        found, losses = gradients(theta)
        first = losses if first is None else first
        for own, w, gradient in zip(theta, stack, found, strict=True):
            own -= steps.inner_lr * (gradient + steps.pull * (own - w))
    assert first is not None
    return [steps.pull * (w - own) for w, own in zip(stack, theta, strict=True)], first


def envelope_gradient(
    parameters: Mapping[str, torch.nn.Parameter], steps: MoreauSteps, backward: Backward, number: int
) -> list[float]:
    """Leave lambda (w - theta) as a network's gradient, by a batch of that number; w's losses by part."""
    w = {name: p.detach().clone() for name, p in parameters.items()}
    losses: list[float] = []
    for count in range(steps.count):
        found = list(backward(number))
        losses = found if count == 0 else losses
        with torch.no_grad():
            for name, p in parameters.items():
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                p.sub_(gradient + steps.pull * (p - w[name]), alpha=steps.inner_lr)
    with torch.no_grad():
        for name, p in parameters.items():
            p.grad = steps.pull * (w[name] - p)
            p.copy_(w[name])
    return losses
