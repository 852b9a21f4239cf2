"""DP-SGD's gradient for heads (Abadi et al. 2016, algorithm 1): every example clipped, the sum noised.

Guarantee: each noised sum is one Gaussian release of sensitivity `clipping_norm` under adding or
removing one example of the client; all that follows (the optimizer, other steps, the update) is
post-processing. It requires batches drawn by Poisson sampling with randomness that nobody else knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.dp.adaptive_norms import AdaptiveNorm, ClippingScales
from atoll.client.heads.layers import Layers, squared_norms
from atoll.privacy.noise import RandomBits, lattice_for
from atoll.protocol.messages import CHARGED_ROUNDS
from atoll.protocol.tensors import Tensors

CLIP_ROUNDING_MARGIN = 1 - 1e-5
"""The factor by which the clipping norm is reduced, so that float32 rounding cannot exceed the norm."""


@dataclass(frozen=True)
class DpSgd:
    """How examples are sampled, clipped and noised in a round.

    Each example's gradient is clipped to the L2 norm `clipping_norm`; the sum gets noise of deviation
    `noise_multiplier * clipping_norm` and is divided by `divisor`, a public number. `random_bits` returns a
    client's source of noise. `draw` takes a client and its examples' numbers (`example_numbers`) and returns
    the places of each step's Poisson batch; without it batches are shuffled as usual, and no amplification by
    sampling may be claimed. `charged` has the number of rounds in each client's ledger, this one included.
    With `adaptive`, each client's clipping norm follows a quantile of its gradients' norms, and
    `noise_multiplier` is what the noised counts leave for the sums.
    """

    clipping_norm: float
    noise_multiplier: float
    divisor: float
    random_bits: Callable[[str], RandomBits]
    draw: Callable[[str, NDArray[np.uint64]], Sequence[NDArray[np.int64]]] | None = None
    charged: Mapping[str, int] = field(default_factory=dict)
    adaptive: AdaptiveNorm | None = None

    def public_fields(self, clients: Sequence[str]) -> tuple[tuple[int, ...], Tensors]:
        """(each client's weight, its states), neither of which depends on private data."""
        nothing = torch.zeros(len(clients), dtype=torch.float64)
        charged = torch.tensor([self.charged.get(c, 0) for c in clients], dtype=torch.float64)
        states = {"train_loss.sum": nothing, "train_loss.count": nothing.clone(), CHARGED_ROUNDS: charged}
        return (1,) * len(clients), states


def clip_factors(
    values: Sequence[torch.Tensor],
    each: Sequence[torch.Tensor],
    share: torch.Tensor,
    private: DpSgd,
    scales: ClippingScales | None = None,
) -> torch.Tensor:
    """The factor that clips each example's gradient and divides it, [clients, batch]; zero where `share` is.

    An example whose gradient isn't finite counts as zero: its entries in `values` and `each` become zero.
    With `scales`, gradients over their client's scale are clipped, and those within the norm are counted.
    """
    norm = squared_norms(values, each).sqrt_()
    unsound = ~torch.isfinite(norm)
    if bool(unsound.any()):
        for tensor in (*values, *each):
            tensor[unsound] = 0
        norm = norm.masked_fill(unsound, 0)
    if scales is not None:
        norm = norm / scales.column(norm)
    clipped = (private.clipping_norm * CLIP_ROUNDING_MARGIN / norm.clamp_min_(1e-12)).clamp_max_(1.0)
    if scales is not None:
        scales.count(clipped >= 1, share > 0)
        clipped = clipped / scales.column(norm)
    return clipped.mul_(share > 0).div_(private.divisor)


@dataclass(frozen=True)
class StackedNoise:
    """One step's noise for one layer, [clients, outputs, padded inputs], in multiples of a granularity."""

    granularity: float
    numbers: torch.Tensor

    def added(self, gradient: torch.Tensor) -> torch.Tensor:
        """The first clients' gradients, rounded to the granularity, plus noise; exact in float64."""
        rounded = (gradient.to(torch.float64) / self.granularity).round_().mul_(self.granularity)
        return rounded.add_(self.numbers[: len(gradient)])


def stacked_noise(
    layers: Layers, steps: Sequence[tuple[str, int]], private: DpSgd, device: str
) -> list[list[StackedNoise]]:
    """The noise by step and layer for clients given as (name, number of steps); padding gets no noise."""
    if private.noise_multiplier == 0:
        return []
    sizes: list[tuple[str, tuple[int, ...]]]
    sizes = [(layer.weight, (layer.outputs, layer.inputs)) for layer in layers.layers]
    sizes += [(layer.bias, (layer.outputs,)) for layer in layers.layers]
    numbers = [prod(shape) for _, shape in sizes]
    sensitivity = private.clipping_norm / private.divisor
    drawn: list[torch.Tensor] = []
    granularity = 0.0
    # Clients of one source, as the system's entropy is for all, draw in one go.
    for source, group in groupby(steps, lambda step: private.random_bits(step[0])):
        counts = [count for _, count in group]
        lattice = lattice_for(private.noise_multiplier, sensitivity, sum(numbers), source)
        noise = torch.from_numpy(lattice.noise(sum(counts) * sum(numbers)).reshape(sum(counts), -1))
        drawn += torch.split(noise, counts)
        granularity = lattice.granularity
    stacked: list[list[StackedNoise]] = []
    for s in range(max(count for _, count in steps)):
        heads = [
            {
                n: t.view(shape)
                for (n, shape), t in zip(sizes, torch.split(of_client[s], numbers), strict=True)
            }
            for of_client in drawn
            if len(of_client) > s
        ]
        stacks = [layers.stack(head, device) for head in heads]
        stacked.append([StackedNoise(granularity, torch.cat(parts)) for parts in zip(*stacks, strict=True)])
    return stacked
