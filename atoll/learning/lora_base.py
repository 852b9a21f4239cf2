"""LoRA's layers in a model: scalings, factors that are frozen, and additions to the frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atoll.errors import ConfigError
from atoll.job.lora_merge import REWRITES, merge_error_is_known
from atoll.protocol.tensors import Tensors
from atoll.strategies.lora.factors import BASE, BASIS, A, B
from atoll.strategies.lora.fedsb import singular_factors
from atoll.strategies.lora.merge import LoraMerge
from atoll.strategies.lora.rolora import alternates
from atoll.strategies.strategy import Strategy

if TYPE_CHECKING:
    from atoll.learning.learner import Learner

PRETRAINED, ADDED = "pretrained_weight", "added_to_weight"
"""Attributes of a layer to whose frozen weight the server adds: the original weight, and the sum added."""


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of each layer with LoRA factors."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def hold(model: nn.Module) -> None:
    """Store the original frozen weights of LoRA's layers, to which the server may add.

    Raises:
        ConfigError: another layer has the same weight.
    """
    uses = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    for name, layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        if uses.count(id(weight)) > 1:
            raise ConfigError(
                f"tune.lora_merge: would add to a weight that {name} shares with another layer; expected"
                " tune.targets without it, or another way of merging"
            )
        vars(layer)[PRETRAINED] = weight.detach().clone()


class Core(nn.Module):
    """A module in place of LoRA's B: the product B R of a fixed `basis` and a trained `core` [r, r]."""

    def __init__(self, basis: nn.Module) -> None:
        super().__init__()
        square: nn.Module
        if isinstance(basis, nn.Conv2d):
            square = nn.Conv2d(basis.in_channels, basis.in_channels, 1, bias=False)
        else:
            assert isinstance(basis, nn.Linear)
            square = nn.Linear(basis.in_features, basis.in_features, bias=False)
        self.core, self.basis = square.to(basis.weight), basis
        nn.init.zeros_(self.core.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.basis(self.core(x))
        return outputs

    @property
    def weight(self) -> torch.Tensor:
        """B R in the shape of LoRA's B, which peft reads."""
        basis: Any = self.basis.weight
        core: Any = self.core.weight
        product: torch.Tensor = basis.flatten(1) @ core.flatten(1)
        return product.reshape(basis.shape)


@torch.no_grad()
def fix_factors(model: nn.Module) -> None:
    """Set every layer's A and B to singular vectors of its weight, with a core of zeros between them.

    Raises:
        ConfigError: the singular vectors of a weight are not determined.
    """
    for name, layer in lora_layers(model):
        weight = _matrix(layer, layer.get_base_layer().weight)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        factors = singular_factors(weight.cpu(), len(a))
        if factors is None:
            raise ConfigError(
                f"tune.lora_merge: 'fedsb' takes its factors from the weight of {name}, which is zero or has"
                " equal singular values, so that sites may find different ones; expected tune.targets without"
                " it, or another way of merging"
            )
        a.copy_(factors.a.reshape(a.shape))
        b.copy_(factors.b.reshape(b.shape))
        layer.lora_B["default"] = Core(layer.lora_B["default"])


def nothing_added(model: nn.Module) -> Tensors:
    """Zeros [out, in] for every weight to which the server may add, by name."""
    held = [
        (name, vars(layer)[PRETRAINED]) for name, layer in lora_layers(model) if PRETRAINED in vars(layer)
    ]
    layers = dict(lora_layers(model))
    return {name + BASE: torch.zeros(_matrix(layers[name], w).shape) for name, w in held}


def load(model: nn.Module, tensors: Tensors) -> None:
    """Load tensors that are not trained: this round's frozen factors, and additions to frozen weights."""
    for name, layer in lora_layers(model):
        for end in (A, B):
            if name + end in tensors:
                layer.get_parameter(end[1:]).copy_(tensors[name + end])
        if PRETRAINED in vars(layer):
            pretrained, weight = vars(layer)[PRETRAINED], layer.get_base_layer().weight
            added = vars(layer)[ADDED] = tensors[name + BASE]
            weight.copy_(pretrained.to(weight) + _like(layer, added, pretrained).to(weight))


def alternate(model: nn.Module, round: int) -> None:
    """Enable gradients for the factors that a round trains; in round 0 for all of them."""
    for name, layer in lora_layers(model):
        for end in (A, B):
            layer.get_parameter(end[1:]).requires_grad_(not round or alternates(name + end, round))


def _matrix(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight as [out, in]; transformers' Conv1D has it transposed."""
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight.flatten(1)


def _like(layer: Any, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] in the shape of the layer's weight."""
    return matrix.T if getattr(layer, "fan_in_fan_out", False) else matrix.reshape(weight.shape)


def merging_lora(strategy: Strategy, learner: Learner) -> Strategy:
    """The strategy, wrapped to merge LoRA's factors as the job says and to report the error of the merge.

    Where the server sees only sums, factors are merged like any tensor and the strategy is returned as it is.
    """
    job = learner.job
    if not merge_error_is_known(job) and job.tune.lora_merge not in REWRITES:
        return strategy
    factors = {n: p.detach().cpu() for n, p in learner.model.named_parameters() if n.endswith((A, B, BASIS))}
    client_tensors = learner.client_tensors
    frozen = {name: value.clone() for name, value in factors.items() if not _is_trained(learner, name)}
    scalings = {
        name: float(layer.scaling["default"])
        for name, layer in lora_layers(learner.model)
        if not {name + A, name + B} & client_tensors.keys()
    }
    known = scalings if merge_error_is_known(job) else {}
    return LoraMerge(strategy, job.tune.lora_merge, job.seed, known, frozen)


def _is_trained(learner: Learner, name: str) -> bool:
    """Whether a parameter is trained in any round."""
    return learner.model.get_parameter(name).requires_grad
