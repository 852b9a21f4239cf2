"""Weights of the form w0 + sum_k a_k z_k, of which only the coefficients a are trained and sent.

FedKSeed (Qin et al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with
Communication Cost under 18 Kilobytes"): w0 are the weights before the first round, and each direction z_k is
drawn from N(0, I) over all parameters, by a stream that the job's seed and k decide. Every site draws the
same directions, so that K coefficients are the whole model, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from atoll.protocol.random_streams import stream
from atoll.protocol.tensors import Tensors

COEFFICIENTS = "coefficients"
"""The name of the parameter [K] that a model has of its directions."""

HELD = "random_directions"
"""The attribute of a model that holds its directions."""


@dataclass
class Directions:
    """The random directions of a network's weights, which start at `start`, by name, on their device.

    `loaded` caches the last loaded coefficients and their weights, so that loading them again needs no draws.
    """

    seed: int
    start: Tensors
    loaded: tuple[torch.Tensor, Tensors] | None = None

    def draw(self, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, part) of direction z_k for k = `number`, shaped as the weights, in the order of names.

        They are drawn in float32 on the processor, wherever the weights are, so that any GPU gets the same.
        """
        generator = stream(self.seed, "direction", number)
        for name, weight in sorted(self.start.items()):
            yield name, torch.randn(weight.shape, generator=generator).to(weight)

    def weights(self, coefficients: torch.Tensor) -> Tensors:
        """w0 + sum_k a_k z_k by name, summed in order of k over nonzero coefficients; do not write into it.

        The bits depend on the coefficients [K] alone, not on what was loaded before. Each nonzero coefficient
        costs a draw of all weights, unless the same coefficients were loaded last.
        """
        wanted = coefficients.detach().cpu()
        if self.loaded is None or not torch.equal(self.loaded[0], wanted):
            moved = {name: weight.clone() for name, weight in self.start.items()}
            for number in wanted.nonzero().flatten().tolist():
                for name, part in self.draw(number):
                    moved[name].add_(part.mul_(float(wanted[number])))
            self.loaded = wanted.clone(), moved
        return self.loaded[1]


def hold(model: nn.Module, seed: int, count: int) -> None:
    """Freeze a model's weights at their values, and add `count` trainable coefficients, all 0."""
    model.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    vars(model)[HELD] = Directions(seed, start)
    model.register_parameter(COEFFICIENTS, nn.Parameter(torch.zeros(count)))


def directions_of(model: nn.Module) -> Directions | None:
    """A model's directions; None for models that are trained in another way."""
    directions: Directions | None = vars(model).get(HELD)
    return directions


def load(model: nn.Module) -> None:
    """Set the weights according to the model's coefficients, if it has any."""
    directions = directions_of(model)
    if directions is None:
        return
    coefficients = model.get_parameter(COEFFICIENTS)
    directions.start = {name: weight.to(coefficients) for name, weight in directions.start.items()}
    place(model, directions.weights(coefficients))


def place(model: nn.Module, weights: Tensors) -> None:
    """Copy weights into the model's parameters of the same names."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)


def make_plain(model: nn.Module) -> None:
    """Remove a model's coefficients, and keep its weights as they are."""
    if directions_of(model) is not None:
        del vars(model)[HELD]
        model.register_parameter(COEFFICIENTS, None)
