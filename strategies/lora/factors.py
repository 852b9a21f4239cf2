"""LoRA's factors in one layer, what their products add up to, and how far a merge is from that.

Hu et al. 2021, "LoRA": a frozen weight W0 [out, in] is used as W0 + s B A, with B [out, r], A [r, in] and s
= alpha / r, or alpha / sqrt(r) where ranks are stabilised. Client i of a round sends B_i and A_i and weighs
w_i, which add up to 1. What the clients agree on is the mean product, s sum_i w_i B_i A_i, and the mean of
products isn't the product of means. A convolution's `in` is its channels times its places. All is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

A, B = ".lora_A.default.weight", ".lora_B.default.weight"
BASE = ".lora_base"
"""How names end after a layer's: its factors, as peft has them; what is added to its weight, [out, in]."""
BASIS, CORE = ".lora_B.default.basis.weight", ".lora_B.default.core.weight"
"""The same where B is the product of two, of which the second is trained (`fedsb.py`)."""


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
    """What a round brings for one layer.

    `weights` [clients] are the w_i, `clients` their factors, `mean` the factors that the strategy has merged
    each on its own, `scaling` is s, `base` what has been added to W0 so far. `fresh_a` draws a new A.
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
    """A layer after the round: its factors, and what its frozen weight has had added, None if nothing is."""

    factors: Factors
    base: torch.Tensor | None = None


def aggregation_error(layer: LayerRound, merged: Merged) -> tuple[float, float]:
    """(Frobenius norm of the mean product minus what was merged, the same over the mean product's own).

    Both with what was added to the frozen weight before; 0 over 0 counts as 0.
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
