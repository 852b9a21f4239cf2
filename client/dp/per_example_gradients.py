"""Every example's own gradient of a model: by Opacus' hooks, or by torch.func where those can't.

Hooks see a layer's inputs and what comes back (Yousefpour et al. 2021, "Opacus"). A parameter that
the whole batch shares in one row (position embeddings), or of a layer that is not in training mode
(batch norm, whose statistics never move here), has no gradient an example there; torch.func takes
the gradient of each example on its own, whatever the layers do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll.backbones.checkpoint import force_attention_mask
from atoll.backbones.encoder import Batch, Model
from atoll.client.dp import convolutions  # noqa: F401  # a rule of Opacus' that it replaces
from atoll.learning import trainable

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, targets) to the mean loss over a batch."""

PerExampleGradients = Callable[[Batch, torch.Tensor], dict[str, torch.Tensor]]
"""(batch, targets) to each example's gradients, [batch, …] by name; only parameters that affect the loss."""


@contextmanager
def per_example_gradients(model: Model, loss: Loss, *, hooks: bool) -> Iterator[PerExampleGradients]:
    """A context that yields a function for per-example gradients with the model's present values."""
    if not hooks:
        yield lambda batch, targets: _by_functions(model, loss, batch, targets)
        return
    with warnings.catch_warnings(), nothing_in_place(model):
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        try:
            hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
            yield lambda batch, targets: _by_hooks(hooked, model, loss, batch, targets)
        finally:
            unhook(model)


@contextmanager
def nothing_in_place(model: nn.Module) -> Iterator[None]:
    """Within the block, no layer overwrites its input, which the hooks still need."""
    changed = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    for module in changed:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True  # type: ignore[assignment]


def unhook(model: nn.Module) -> None:
    """Remove everything that Opacus puts on a model, also where it stopped half way."""
    for handle in vars(model).pop("autograd_grad_sample_hooks", []):
        handle.remove()
    for module in model.modules():
        for name in ("ft_compute_sample_grad", "activations", "max_batch_len"):
            vars(module).pop(name, None)
    for p in model.parameters():
        p.grad = None
        for name in ("grad_sample", "_forward_counter", "_current_grad_sample"):
            vars(p).pop(name, None)


def hooks_suffice(model: Model, loss: Loss, batch: Batch, targets: torch.Tensor) -> bool:
    """Whether Opacus' hooks yield one gradient per example for every parameter that the loss depends on."""
    try:
        with per_example_gradients(model, loss, hooks=True) as gradients:
            by_hooks = gradients(batch, targets)
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return False  # layers that Opacus has no rule for; torch.func needs none
    parameters = trainable.trainable(model)
    shapes = {name: (len(targets), *p.shape) for name, p in parameters.items()}
    reached = _reached(model, loss, batch, targets)
    return by_hooks.keys() >= reached and all(by_hooks[name].shape == shapes[name] for name in by_hooks)


def _reached(model: Model, loss: Loss, batch: Batch, targets: torch.Tensor) -> set[str]:
    """Names of the parameters for which the loss of the batch has a nonzero gradient."""
    parameters = trainable.trainable(model)
    with torch.enable_grad():
        value = loss(model(batch), targets)
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name for name, g in zip(parameters, gradients, strict=True) if g is not None and bool(g.any())}


def _by_hooks(
    hooked: GradSampleModule, model: Model, loss: Loss, batch: Batch, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    (loss(hooked(batch), targets) * len(targets)).backward()  # type: ignore[no-untyped-call]
    samples = {}
    for name, p in trainable.trainable(model).items():
        if p.grad_sample is not None:  # type: ignore[attr-defined]
            samples[name] = p.grad_sample.detach()  # type: ignore[attr-defined]
        p.grad = p.grad_sample = None  # type: ignore[attr-defined]
    return samples


def _by_functions(model: Model, loss: Loss, batch: Batch, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    force_attention_mask(model)
    values = {name: p.detach() for name, p in trainable.trainable(model).items()}

    def of_one(parameters: dict[str, torch.Tensor], one: Batch, target: torch.Tensor) -> torch.Tensor:
        alone = {name: t.unsqueeze(0) for name, t in one.items()}
        return loss(functional_call(model, parameters, (alone,)), target.unsqueeze(0))

    # Of attention's ways only the plain one has a rule for maps.
    with sdpa_kernel(SDPBackend.MATH):
        samples: dict[str, torch.Tensor] = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")(
            values, batch, targets
        )
    return samples
