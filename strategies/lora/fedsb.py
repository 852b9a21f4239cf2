"""Fed-SB (Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency").

With symbols as in `factors.py`, a layer is used as W0 + s B R A, where B [out, r] and A [r, in] are the same
at all clients and never change, and only R [r, r] is trained and travels:

    sum_i w_i B R_i A = B (sum_i w_i R_i) A

so that the mean of R is exact. As with FFA-LoRA it is linear in what clients send, so that secure sums,
clipping and noise mean for it what they mean for any weight; r² numbers a layer are the fewest of all ways.

The paper (arXiv 2502.15371) takes B and A from the singular vectors of the first full gradient, averaged over
clients, which is a round of whole layers and a look at examples. Here they are the frozen weight's, as in
LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604) but for its singular values: with W0 = U S V^T, B = U[:, :r]
and A = V[:, :r]^T, and R begins as zero. They follow from the weights alone, so that nobody sends them and no
promise of privacy is charged for them; `atoll/learning/lora_base.py` puts them into a model.
"""

from __future__ import annotations

import torch

from atoll.strategies.lora.average import average, is_trained
from atoll.strategies.lora.factors import Factors

__all__ = ["average", "is_trained", "singular_factors", "with_core"]

LEAST = 1e-6
"""Singular values below this part of the greatest one are rounding: their directions are nobody's."""
CLOSE = 1e-8
"""Of singular values nearer to each other, as a part of the greatest, other libraries find other vectors."""


def with_core(basis: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """B R, in LoRA's place of B: [..., out, r] of B [out, r] and R [..., r, r]."""
    return basis @ core


def singular_factors(weight: torch.Tensor, rank: int) -> Factors | None:
    """B [out, rank] and A [rank, in] of a weight [out, in], with orthonormal columns and rows; in float64.

    Of each pair of vectors the largest number in B's is positive, for a decomposition leaves both signs open.
    Where the weight has fewer directions than `rank`, what is missing is zero, and R does nothing there.
    None where the vectors aren't determined: of a weight that is zero, and where singular values are equal,
    as an orthogonal weight's are. Each site finds them by itself, so all must find the same.

    >>> factors = singular_factors(torch.tensor([[0.0, -3.0], [1.0, 0.0]]), rank=1)
    >>> (factors.b @ factors.a).round(decimals=6).add(0).tolist()
    [[0.0, -1.0], [0.0, 0.0]]
    """
    u, s, v = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    count = min(rank, int((s > LEAST * s[0]).sum()))
    if not count or bool((s[:-1] - s[1:] < CLOSE * s[0])[:count].any()):
        return None
    b, a = u[:, :count], v[:count]
    signs = b.gather(0, b.abs().argmax(0, keepdim=True)).sign()
    missing = rank - count
    pad = torch.nn.functional.pad
    return Factors(pad(b * signs, (0, missing)), pad(a * signs.T, (0, 0, 0, missing)))
