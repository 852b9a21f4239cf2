"""FlexLoRA (Bai et al. 2024, "Federated Fine-tuning of LLMs under Heterogeneous Tasks and Client Resources").

With symbols as in `factors.py`: the server takes the mean product's singular value decomposition and sends
its r largest parts back as factors,

    sum_i w_i B_i A_i = U S V^T,    B <- U[:, :r] S[:r],    A <- V[:, :r]^T

which no factors of rank r come nearer to (Eckart and Young 1936): the reported error is the norm of what is
cut off, zero where the mean product has no higher rank. A client of a lower rank r_i (`tune.lora_ranks`)
takes the first r_i columns of B and rows of A, its own best approximation, and zeros for the others, which
have no gradient: training leaves them zero. That is HetLoRA's truncation and padding (Cho et al. 2024); a
mean of padded factors, which HetLoRA then takes, would count zeros as if they had been learnt.

The decomposition is of the product of two triangles, [clients r, clients r] at most, and never of [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from atoll.protocol.tensors import Tensors
from atoll.strategies.lora.factors import A, B, Factors, LayerRound, Merged


def flexlora(layer: LayerRound) -> Merged:
    """The best factors of rank r for the mean product."""
    return Merged(best_factors(layer.side_by_side, layer.mean.b.shape[1]))


def best_factors(wide: Factors, rank: int) -> Factors:
    """Factors of rank `rank` whose product is nearest to `wide`'s, the largest singular values first."""
    left, right = torch.linalg.qr(wide.b), torch.linalg.qr(wide.a.T)
    u, s, v = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    b, a = (left.Q @ u * s)[:, :rank], (v @ right.Q.T)[:rank]
    missing = rank - b.shape[1]  # of a layer that is smaller than the rank
    return Factors(torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing)))


def truncated(model: Tensors, rank: int) -> Tensors:
    """The model with zeros in all of LoRA's factors from index `rank` on."""
    return {name: _cut(name, tensor, rank) for name, tensor in model.items()}


def _cut(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    if not name.endswith((A, B)):
        return tensor
    cut = tensor.clone()
    (cut if name.endswith(A) else cut.transpose(0, 1))[rank:] = 0
    return cut


def starts_by_rank(model: Tensors, ranks: Mapping[str, int], clients: Sequence[str]) -> dict[str, Tensors]:
    """The tensors from which clients with a lower rank start, by client."""
    return {client: truncated(model, ranks[client]) for client in clients if client in ranks}
