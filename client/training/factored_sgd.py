"""Plain SGD for large linear layers that never stores their gradients: one operation applies both factors.

The gradient of W [out, in] is the product of what comes back [rows, out] and the layer's input [rows, in].
For a small batch, writing that product out and adding it to W costs more than its arithmetic: both go
through memory, as large as the layer. Here W -= lr * back^T input is one operation, after the backward
pass, so that all of it sees the values that the forward pass saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from atoll.client.training.optimizers import is_plain
from atoll.job.job import Job

LARGE = 1 << 16
"""The smallest number of values in a weight whose gradient is not stored."""


class Factors:
    """The factors whose product is one weight's gradient in a step."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(self, lr: float) -> None:
        """Take the step in the weight, and drop the factors."""
        with torch.no_grad():
            for back, inputs in self.pairs:
                self.weight.addmm_(back.t(), inputs, alpha=-lr)
        self.pairs.clear()

    def holds(self, back: torch.Tensor, inputs: torch.Tensor) -> bool:
        """Store factors [rows, out] and [rows, in] if they are smaller than their product; whether it did."""
        if back.numel() + inputs.numel() >= self.weight.numel():
            return False
        self.pairs.append((back, inputs))
        return True


class _Linear(torch.autograd.Function):
    """A linear layer whose weight gradient is stored as two factors, where they are smaller."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: Any, factors: Factors) -> Any:
        ctx.save_for_backward(inputs, weight)
        ctx.factors = factors
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, back: torch.Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        rows, entered = back.reshape(-1, back.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        of_inputs, of_bias = (ctx.needs_input_grad[i] for i in (0, 2))
        return (
            back @ weight if of_inputs else None,
            None if ctx.factors.holds(rows, entered) else rows.t() @ entered,
            rows.sum(0) if of_bias else None,
            None,
        )


@contextmanager
def outer_product_sgd(model: nn.Module, job: Job, *, has_terms: bool) -> Iterator[list[Factors]]:
    """A context that yields the factors of the model's large linear layers; none unless SGD is plain float32.

    Further exclusions: terms added to gradients need the gradients themselves; accumulation and activation
    checkpointing save memory, which stored factors would take again.
    """
    train = job.train
    saves_memory = train.accumulate > 1 or train.checkpoint_activations
    if not is_plain(train) or has_terms or saves_memory or train.precision != "fp32":
        yield []
        return
    changed: list[tuple[nn.Linear, Factors]] = []
    by_weight: dict[int, Factors] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(module) is not nn.Linear or weight is None or "forward" in vars(module):
            continue
        if weight.requires_grad and weight.numel() >= LARGE and weight.dtype == torch.float32:
            changed.append((module, by_weight.setdefault(id(weight), Factors(weight))))
    try:
        for module, factors in changed:
            module.forward = partial(_forward, module, factors)  # type: ignore[method-assign]
        yield list(by_weight.values())
    finally:
        for module, _ in changed:
            del module.forward


def _forward(module: nn.Linear, factors: Factors, inputs: torch.Tensor) -> Any:
    return _Linear.apply(inputs, module.weight, module.bias, factors)
