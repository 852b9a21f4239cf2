"""Per-FedAvg's client (Fallah et al. 2020), first order; `strategies/meta/per_fedavg.py` has the symbols.

A local step takes its gradient at w' = w - alpha grad f(w; D), and moves w by it. D is the batch before in
the round's order; the first step's is the last one, and a client with one batch has D = D'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from atoll.client.heads.layers import Layers, Loss, Stack, sgd_step_
from atoll.job.extension_options import validated
from atoll.job.job import Job
from atoll.strategies.options import PerFedAvgOptions

Backward = Callable[[int], Iterable[float]]
"""Takes a batch's number, leaves its gradient in the network, and yields the losses of the batch's parts."""


def inner_lr_of(job: Job) -> float:
    """The paper's alpha, or 0 for jobs whose strategy is not Per-FedAvg."""
    if job.strategy.name != "per-fedavg":
        return 0.0
    options = validated(PerFedAvgOptions, job.strategy.options or {}, "strategy.options")
    assert isinstance(options, PerFedAvgOptions)
    return options.inner_lr


def inner_batches(step: int, steps: Sequence[int]) -> list[int]:
    """The number of each client's batch D in this step; `steps` has each client's number of steps.

    >>> inner_batches(0, [3, 1]), inner_batches(2, [3])
    ([2, 0], [1])
    """
    return [(step - 1) % count for count in steps]


def adapted_heads(
    layers: Layers, stack: Stack, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor,
    share: torch.Tensor, alpha: float,
) -> Stack:  # fmt: skip
    """The paper's w' of stacked heads, for inputs [clients, batch, width] weighted by `share`."""
    values = layers.forward(stack, inputs)
    error, _ = loss.grad(values[-1], targets)
    each = layers.output_gradients(stack, values, error)
    moved = [matrix.clone() for matrix in stack]
    sgd_step_(moved, values, [e.mul_(share.unsqueeze(2)) for e in each], alpha)
    return moved


def gradient_after_a_step(
    parameters: Mapping[str, torch.nn.Parameter], alpha: float, steps: int, backward: Backward, number: int
) -> list[float]:
    """Leave the gradient at w' in the network, and return the losses there by part of the batch."""
    list(backward(inner_batches(number, [steps])[0]))
    w = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            if p.grad is not None:
                p.sub_(p.grad, alpha=alpha)
    losses = list(backward(number))
    with torch.no_grad():
        for name, values in w.items():
            parameters[name].copy_(values)
    return losses
