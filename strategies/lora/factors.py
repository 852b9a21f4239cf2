"""LoRA's factors in one layer, the mean of the clients' products, and the error of a merge against it.

Hu et al. 2021, "LoRA": a frozen weight W0 [out, in] is used as W0 + s B A, with B [out, r], A [r, in] and
s = alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA. Client i of a round sends B_i and A_i and has the
weight w_i; the weights sum to 1. An exact merge has the mean product, s sum_i w_i B_i A_i, which differs from
the product of the mean factors. A convolution's `in` is its input channels times its kernel size. All numbers
are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

A, B = ".lora_A.default.weight", ".lora_B.default.weight"
BASE = ".lora_base"
"""Suffixes of a layer's name: its factors, as peft names them, and what is added to its weight [out, in]."""
BASIS, CORE = ".lora_B.default.basis.weight", ".lora_B.default.core.weight"
"""Suffixes where B is the product of a fixed basis and a trained core (`fedsb.py`)."""


@dataclass(frozen=True)
class Factors:
    """B [out, r] and A [r, in] of one model, or of all clients: [clients, out, r] and [clients, r, in]."""

    b: torch.Tensor
    a: torch.Tensor

    @property
    def product(self) -> torch.Tensor:
        """B A, [out, in]."""
        return self.b @ self.a


@dataclass(frozen=True)
class LayerRound:
    """One layer's factors and weights in a round.

    `weights` [clients] are the w_i, `clients` the clients' factors, `mean` the factors as the job's strategy
    merged them, `scaling` is s, and `base` the sum of what was added to W0 so far. `fresh_a` draws a new A.
    """

    weights: torch.Tensor
    clients: Factors
    mean: Factors
    scaling: float
    base: torch.Tensor
    fresh_a: Callable[[], torch.Tensor]

    @property
    def side_by_side(self) -> Factors:
        """One pair of factors whose product is sum_i w_i B_i A_i: [out, clients r], [clients r, in]."""
        weighted = self.weights[:, None, None] * self.clients.b
        return Factors(torch.cat(list(weighted), dim=1), torch.cat(list(self.clients.a), dim=0))


@dataclass(frozen=True)
class Merged:
    """A layer after the round: its factors, and the sum of what was added to its frozen weight, if any."""

    factors: Factors
    base: torch.Tensor | None = None


def aggregation_error(layer: LayerRound, merged: Merged) -> tuple[float, float]:
    """(Frobenius norm of the mean product minus the merged one, that over the norm of the mean product).

    Both products include what was added to the frozen weight before. 0 / 0 counts as 0.
    """
    meant, s = layer.side_by_side, layer.scaling
    if merged.base is not None:
        target = layer.base + s * meant.product
        apart, whole = target - merged.base - s * merged.factors.product, target
    else:
        wide = meant.b.shape[1]
        left = torch.linalg.qr(torch.cat([meant.b, -merged.factors.b], dim=1), mode="r").R
        right = torch.linalg.qr(torch.cat([meant.a, merged.factors.a], dim=0).T, mode="r").R
        # Orthogonal factors change no norm: products of the triangles stand for those of [out, in].
        apart, whole = s * left @ right.T, s * left[:, :wide] @ right[:, :wide].T
    error, size = (float(torch.linalg.matrix_norm(matrix)) for matrix in (apart, whole))
    return error, error / size if size else 0.0
