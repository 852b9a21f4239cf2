"""Weights that lie at w0 + sum_k a_k z_k, of which only the coefficients a are trained and travel.

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
    """The directions of a network's weights, and where those begin: `start` by name, on their device.

    `loaded` are the weights of the coefficients that were loaded last, so that who loads the same again waits
    for no draws.
    """

    seed: int
    start: Tensors
    loaded: tuple[torch.Tensor, Tensors] | None = None

    def draw(self, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The parts of direction z_k for k = `number`, each like the weight of its name, in order of names.

        Drawn by the processor in float32, wherever the weights are: so they are the same beside any GPU.
        """
        generator = stream(self.seed, "direction", number)
        for name, weight in sorted(self.start.items()):
            yield name, torch.randn(weight.shape, generator=generator).to(weight)

    def weights(self, coefficients: torch.Tensor) -> Tensors:
        """w0 + sum_k a_k z_k, added up in order of k, without those of coefficient 0; not to be written into.

        So the bits depend on the coefficients [K] alone, and not on what was loaded or trained before. It
        costs a draw of all weights for each coefficient that isn't 0, unless these were loaded last.
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
    """Freeze a model's weights where they are, and give it `count` coefficients, all 0, to be trained."""
    model.requires_grad_(False)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    vars(model)[HELD] = Directions(seed, start)
    model.register_parameter(COEFFICIENTS, nn.Parameter(torch.zeros(count)))


def directions_of(model: nn.Module) -> Directions | None:
    """A model's directions; None of one that is tuned another way."""
    directions: Directions | None = vars(model).get(HELD)
    return directions


def load(model: nn.Module) -> None:
    """Put the weights where the model's coefficients say they are, if it has any."""
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
    """Leave a model with its weights as they are, and without coefficients."""
    if directions_of(model) is not None:
        del vars(model)[HELD]
        model.register_parameter(COEFFICIENTS, None)
