"""Clipped sums of a model's gradients that never lay out the gradient of an example of a large layer.

The gradient of a linear layer's weight is, for one example, a sum of outer products over its positions, and
its norm follows from the products of positions alone (Li et al. 2022, "Large Language Models Can Be Strong
Differentially Private Learners", section 4): Opacus' rules for norms compute it. The clipped sum is the
weighted sum of the same outer products, kept from the same one pass (Bu et al. 2023, "Differentially Private
Optimization on Large Foundation Models at Low Cost"). So what is summed is what was measured: a second
backward pass of weighted losses rounds differently, and would carry what isn't finite to other examples.

Sensitivity: products of float32 numbers are exact in float64, in which all that follows is computed, and a
norm is rounded up by a bound on what its sums may lose to rounding. So no example adds more than its clipped
norm, whatever cancels in its gradient, and `CLIP_ROUNDING_MARGIN` covers the rounding of the sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import nn

from atoll.backbones.encoder import Batch, Model
from atoll.client.dp import convolutions  # noqa: F401  # a rule of Opacus' that it replaces
from atoll.client.dp.per_example_gradients import Loss, PerExampleGradients, nothing_in_place, unhook
from atoll.learning import trainable
from atoll.protocol.tensors import Tensors

NORM_RULES: Mapping[type, Callable[..., dict[nn.Parameter, torch.Tensor]]] = (
    GradSampleModuleFastGradientClipping.NORM_SAMPLERS
)
"""Opacus' rules for the norms of each example's gradient, by type of layer."""

NUMBERS_AT_ONCE = 2**23
"""How many numbers of a layer's inputs and output gradients are in memory in float64 together."""

FOLDED = 4093
"""A prime, so that what is added up has nothing to do with a tensor's rows."""

ROUNDING = 2.0**-53
"""The relative error of one operation in float64."""


class OtherRows(ValueError):
    """A layer's input has other rows than the batch; the message names the layer, and nothing of the data."""


class Term(Protocol):
    """The part of a parameter's gradient that one call of a layer brings, for every example."""

    def squared_norms(self) -> torch.Tensor:
        """Squared norms of the examples' gradients, [batch] in float64."""

    def sample(self) -> torch.Tensor:
        """Every example's gradient, [batch, …]."""

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        """Add the gradients times the examples' factors; examples of factor 0 aren't looked at."""


@dataclass(frozen=True)
class Sampled:
    """Gradients that are laid out, [batch, …]."""

    gradients: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(self.gradients.flatten(1), dim=1, dtype=torch.float64)
        return norms.square()

    def sample(self) -> torch.Tensor:
        return self.gradients

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        for row in factors.nonzero()[:, 0].tolist():
            total.add_(self.gradients[row], alpha=float(factors[row]))


@dataclass(frozen=True)
class Recomputed:
    """Gradients that take more memory than what they are made of: only their norms are kept."""

    squares: torch.Tensor
    compute: Callable[[], torch.Tensor]

    def squared_norms(self) -> torch.Tensor:
        return self.squares

    def sample(self) -> torch.Tensor:
        return self.compute()

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        Sampled(self.compute()).add_to(total, factors)


@dataclass(frozen=True)
class OuterProducts:
    """The gradient of a linear layer's or an embedding's weight, as outer products over positions.

    `inputs` are [batch, positions, inputs], or the numbers of an embedding's rows, [batch, positions];
    `backprops` [batch, positions, outputs].
    """

    layer: nn.Linear | nn.Embedding
    inputs: torch.Tensor
    backprops: torch.Tensor

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.layer.weight)

    @property
    def looks_up(self) -> bool:
        """Whether the layer is an embedding."""
        return not torch.is_floating_point(self.inputs)

    @property
    def positions(self) -> int:
        return self.backprops.shape[1]

    def exact(self, rows: torch.Tensor) -> OuterProducts:
        """These examples' products in float64."""
        inputs = self.inputs[rows]
        exact = inputs if self.looks_up else inputs.double()
        return OuterProducts(self.layer, exact, self.backprops[rows].double())

    def numbers(self) -> int:
        """How many numbers an example has here."""
        return self.inputs[:1].numel() + self.backprops[:1].numel()

    def squared_norms(self) -> torch.Tensor:
        return squared_norms_of([self])

    def sample(self) -> torch.Tensor:
        size, device = len(self.backprops), self.backprops.device
        found = torch.zeros(size, *self.weight.shape, dtype=torch.float64, device=device)
        for gradient, only in zip(found, torch.eye(size, dtype=torch.float64, device=device), strict=True):
            self.add_to(gradient, only)
        return found

    def add_to(self, total: torch.Tensor, factors: torch.Tensor) -> None:
        for rows in torch.split(factors.nonzero()[:, 0], max(1, NUMBERS_AT_ONCE // self.numbers())):
            part = self.exact(rows)
            weighted = (part.backprops * factors[rows].view(-1, 1, 1)).flatten(0, 1)
            if self.looks_up:
                total.index_add_(0, part.inputs.flatten(), weighted)
            else:
                total.addmm_(weighted.T, part.inputs.flatten(0, 1))


def squared_norms_of(terms: list[OuterProducts]) -> torch.Tensor:
    """Squared norms of the examples' gradients that the calls of layers with one weight add up to, [batch].

    They are rounded up: by n u s², where s is the sum of the outer products' norms, u the unit of rounding,
    n the number of additions (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1).
    """
    batch = torch.arange(len(terms[0].backprops), device=terms[0].backprops.device)
    found = []
    for rows in torch.split(batch, max(1, NUMBERS_AT_ONCE // sum(term.numbers() for term in terms))):
        parts = [term.exact(rows) for term in terms]
        if len(parts) == 1:
            squares = _by_rule(parts[0])
        else:
            squares = sum((_inner(one, other) for one in parts for other in parts), torch.zeros(()))
        additions = sum(term.positions for term in terms) ** 2 + sum(terms[0].weight.shape)
        found.append(squares.clamp_min(0) + additions * ROUNDING * _longest(parts).square())
    return torch.cat(found)


def _by_rule(part: OuterProducts) -> torch.Tensor:
    """Squared norms by Opacus' rule for the layer, [batch]."""
    norms = NORM_RULES[type(part.layer)](part.layer, [part.inputs], part.backprops)
    return norms[part.weight].square()


def _longest(parts: list[OuterProducts]) -> torch.Tensor:
    """The sum of the outer products' norms: what an example's gradient has if nothing cancels, [batch]."""
    return torch.stack(
        [
            (part.backprops.norm(dim=2) * (1 if part.looks_up else part.inputs.norm(dim=2))).sum(1)
            for part in parts
        ]
    ).sum(0)


def _inner(one: OuterProducts, other: OuterProducts) -> torch.Tensor:
    """The inner products of two calls' gradients of the same weight, [batch]."""
    if one.looks_up and other.looks_up:
        same = (one.inputs.unsqueeze(2) == other.inputs.unsqueeze(1)).double()
        return (same * (one.backprops @ other.backprops.mT)).sum((1, 2))
    if one.looks_up:
        return _inner(other, one)
    if other.looks_up:
        # A row of the weight is an output of the linear layer and what the embedding looks up.
        chosen = other.inputs.unsqueeze(1).expand(-1, one.positions, -1)
        return (one.backprops.gather(2, chosen) * (one.inputs @ other.backprops.mT)).sum((1, 2))
    return ((one.backprops @ other.backprops.mT) * (one.inputs @ other.inputs.mT)).sum((1, 2))


@dataclass(frozen=True)
class PassedBatch:
    """A batch that went through the model and back: norms and weighted sums of its examples' gradients.

    `terms` are the parts of each parameter's gradient, one for each call of a layer that has it.
    """

    parameters: Mapping[str, nn.Parameter]
    terms: Mapping[str, list[Term]]

    def squared_norms(self) -> torch.Tensor:
        """Of each example's gradient over all trainable tensors together, [batch] in float64, rounded up."""
        return torch.stack([_squared_norms(terms) for terms in self.terms.values()]).sum(0)

    def add_to(self, total: Tensors, factors: torch.Tensor) -> None:
        """Add the gradients times the examples' factors, [batch], to float64 tensors by name."""
        for name, terms in self.terms.items():
            for term in terms:
                term.add_to(total[name], factors.to(total[name].device))

    def sum_of(self, factors: torch.Tensor) -> Tensors:
        """The sum of the gradients times the examples' factors, by name in float64."""
        total = zeros_like(self.parameters)
        self.add_to(total, factors)
        return total


def zeros_like(parameters: Mapping[str, nn.Parameter]) -> Tensors:
    """Zeros of the parameters' shapes in float64, where the parameters are."""
    return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}


def _squared_norms(terms: list[Term]) -> torch.Tensor:
    """Squared norms of the examples' gradients of one parameter, [batch]."""
    if len(terms) == 1:
        return terms[0].squared_norms()
    products = [term for term in terms if isinstance(term, OuterProducts)]
    if len(products) == len(terms):
        return squared_norms_of(products)
    whole = torch.stack([term.sample().double() for term in terms]).sum(0)
    return Sampled(whole).squared_norms()


def terms_of(
    layer: nn.Module, inputs: list[torch.Tensor], backprops: torch.Tensor
) -> Iterator[tuple[nn.Parameter, Term]]:
    """(parameter, its term) for a layer's call, whose `inputs` and `backprops` have the batch first.

    Of a weight only the outer products are kept where the products of all pairs of positions, twice, take
    less than a gradient (Li et al. 2022). Of everything else either the gradients are kept or what they are
    made of, whichever takes less.
    """
    if type(layer) not in (nn.Linear, nn.Embedding):
        yield from _sampled(layer, inputs, backprops)
        return
    products = _outer_products(cast(nn.Linear | nn.Embedding, layer), inputs[0], backprops)
    bias = getattr(layer, "bias", None)
    if products.weight.requires_grad:
        laid_out = 2 * products.positions**2 > products.weight.numel()
        yield products.weight, Sampled(products.sample()) if laid_out else products
    if bias is not None and bias.requires_grad:
        yield bias, Sampled(products.backprops.sum(1, dtype=torch.float64))


def _outer_products(
    layer: nn.Linear | nn.Embedding, inputs: torch.Tensor, backprops: torch.Tensor
) -> OuterProducts:
    """The products of a layer's call, with all positions in one dimension."""
    size = len(backprops)
    by_position = backprops.reshape(size, -1, backprops.shape[-1])
    if isinstance(layer, nn.Linear):
        return OuterProducts(layer, inputs.reshape(size, -1, inputs.shape[-1]), by_position)
    rows = inputs.reshape(size, -1)
    if layer.padding_idx is not None:
        # Opacus' rules count this row, which never learns.
        by_position = by_position.masked_fill((rows == layer.padding_idx).unsqueeze(-1), 0)
    return OuterProducts(layer, rows, by_position)


def _sampled(
    layer: nn.Module, inputs: list[torch.Tensor], backprops: torch.Tensor
) -> Iterator[tuple[nn.Parameter, Term]]:
    """The terms of a layer without a rule for norms."""
    sampler = GradSampleModule.GRAD_SAMPLERS.get(type(layer), ft_compute_per_sample_gradient)
    held = sum(t.numel() for t in (*inputs, backprops))
    for parameter, gradients in sampler(layer, inputs, backprops).items():
        if not parameter.requires_grad:
            continue
        term = Sampled(gradients)
        if gradients.numel() <= held:
            yield parameter, term
        else:
            compute = partial(_sample_of, sampler, layer, inputs, backprops, parameter)
            yield parameter, Recomputed(term.squared_norms(), compute)


def _sample_of(
    sampler: Callable[..., dict[nn.Parameter, torch.Tensor]],
    layer: nn.Module,
    inputs: list[torch.Tensor],
    backprops: torch.Tensor,
    parameter: nn.Parameter,
) -> torch.Tensor:
    return sampler(layer, inputs, backprops)[parameter]


class _Recorder(GradSampleModule):  # type: ignore[misc]
    """Opacus' hooks, which keep the terms of a pass instead of its gradients."""

    def __init__(self, model: Model, loss: Loss) -> None:
        super().__init__(model, batch_first=True, loss_reduction="sum", strict=False)
        self.loss = loss
        self.parameters_by_name = trainable.trainable(model)
        self.names = {id(p): name for name, p in self.parameters_by_name.items()}
        self.terms: dict[str, list[Term]] = {}
        self.size = 0
        for layer in model.modules():
            if type(layer) is nn.Embedding and layer.weight.requires_grad:
                self.autograd_grad_sample_hooks.append(layer.register_forward_pre_hook(self._with_a_row_each))

    def _with_a_row_each(self, layer: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        """What the whole batch looks up in one row, such as positions, looked up by each example."""
        (rows,) = inputs
        return (rows.expand(self.size, *rows.shape[1:]),) if len(rows) == 1 else inputs

    def capture_backprops_hook(
        self,
        module: nn.Module,
        _forward_input: Any,
        forward_output: tuple[torch.Tensor, ...],
        loss_reduction: str,
        batch_first: bool,
    ) -> None:
        inputs, backprops = self.rearrange_grad_samples(
            module=module,
            backprops=forward_output[0].detach(),
            loss_reduction=loss_reduction,
            batch_first=batch_first,
        )
        if {len(backprops), *map(len, inputs)} != {self.size}:
            raise OtherRows(f"a {type(module).__name__} sees the batch's examples in other rows than theirs")
        for parameter, term in terms_of(module, inputs, backprops):
            self.terms.setdefault(self.names[id(parameter)], []).append(term)

    def passed(self, batch: Batch, targets: torch.Tensor) -> PassedBatch:
        """The batch after a pass forward and back."""
        self.terms, self.size = {}, len(targets)
        try:
            (self.loss(self(batch), targets) * len(targets)).backward()  # type: ignore[no-untyped-call]
            return PassedBatch(self.parameters_by_name, self.terms)
        finally:
            self.terms = {}
            for module in self.modules():
                for name in ("activations", "max_batch_len"):
                    vars(module).pop(name, None)
            for p in self.parameters_by_name.values():
                p.grad = None


Passes = Callable[[Batch, torch.Tensor], PassedBatch]
"""(batch, targets) to the batch after its pass."""


@contextmanager
def ghost_passes(model: Model, loss: Loss) -> Iterator[Passes]:
    """A context that yields a function for passes with the model's present values."""
    with warnings.catch_warnings(), nothing_in_place(model):
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        try:
            yield _Recorder(model, loss).passed
        finally:
            unhook(model)


@contextmanager
def folded_gradients(model: Model, loss: Loss) -> Iterator[PerExampleGradients]:
    """A context that yields a function for what identifies each example's gradient as ghost norms clip it.

    A tensor of more than `FOLDED` numbers is folded: every `FOLDED`-th number is added up. So gradients can
    be compared without having them all in memory.
    """
    with ghost_passes(model, loss) as passes:

        def gradients(batch: Batch, targets: torch.Tensor) -> Tensors:
            passed = passes(batch, targets)
            each = [_folded(passed.sum_of(row)) for row in torch.eye(len(targets), dtype=torch.float64)]
            return {name: torch.stack([one[name] for one in each]) for name in passed.terms}

        yield gradients


def _folded(gradient: Tensors) -> Tensors:
    found = {}
    for name, tensor in gradient.items():
        flat = tensor.flatten()
        missing = -len(flat) % min(FOLDED, len(flat))
        found[name] = nn.functional.pad(flat, (0, missing)).view(-1, min(FOLDED, len(flat))).sum(0)
    return found
