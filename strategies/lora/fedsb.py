"""Fed-SB (Singhal et al. 2025, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency").

With symbols as in `factors.py`, a layer is used as W0 + s B R A, where B [out, r] and A [r, in] are the same
at all clients and never change, and only R [r, r] is trained and travels:

    sum_i w_i B R_i A = B (sum_i w_i R_i) A

so that the mean of R is exact. As with FFA-LoRA the merged model is linear in what clients send, so secure
sums, clipping and noise act on R as on any weight. No other method sends fewer than its r² numbers a layer.

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
"""Singular values below this part of the largest one are rounding errors and count as zero."""
CLOSE = 1e-8
"""Singular values that differ by less than this part of the largest count as equal: libraries then find
different vectors."""


def with_core(basis: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """The product B R, which stands where LoRA has B: [..., out, r] from B [out, r] and R [..., r, r]."""
    return basis @ core


def singular_factors(weight: torch.Tensor, rank: int) -> Factors | None:
    """B [out, rank] and A [rank, in] of a weight [out, in], with orthonormal columns and rows; in float64.

    The decomposition determines each pair of vectors up to its sign; here the largest number in B's is
    positive. If the weight's rank is below `rank`, the remaining columns and rows are zero.

    None if the vectors are not determined, because the weight is zero or singular values are equal, as those
    of an orthogonal weight: each site computes the vectors by itself, and all must get the same.

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
