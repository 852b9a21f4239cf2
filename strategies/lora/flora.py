"""FLoRA (Wang et al. 2024, "FLoRA: Federated Fine-Tuning LLMs with Heterogeneous Low-Rank Adaptations").

With symbols as in `factors.py`, the adapters of a round are stacked, B = [w_1 B_1 ... w_K B_K] and A =
[A_1; ...; A_K], whose product is the mean product, and folded into the frozen weight; clients begin the
next round with a new one:

    W0 <- W0 + s B A,    B <- 0,    A <- drawn anew (He et al. 2015, as peft draws it)

so that the merge is exact whatever the ranks are. As in FedEx-LoRA the server sends the sum of all that was
folded, [out, in] in float32: a client that has missed rounds needs it all. The new A follows from the job's
seed, the round and the layer, and is the same at every client.
"""

from __future__ import annotations

import torch

from atoll.strategies.lora.factors import Factors, LayerRound, Merged


def flora(layer: LayerRound) -> Merged:
    """A new adapter with product zero; the mean product is added to the frozen weight."""
    fresh = Factors(torch.zeros_like(layer.mean.b), layer.fresh_a())
    return Merged(fresh, layer.base + layer.scaling * layer.side_by_side.product)
