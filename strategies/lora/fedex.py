"""FedEx-LoRA (Singhal et al. 2024, "Exact Aggregation for Federated and Efficient Fine-Tuning").

With symbols as in `factors.py`, factors are merged to their means, and the residual is added to the frozen
weight:

    B  <- sum_i w_i B_i,    A <- sum_i w_i A_i
    W0 <- W0 + s (sum_i w_i B_i A_i - B A)

so that W0 + s B A is the mean of the clients' models, exactly, and clients go on from means of their
factors. The residual has a rank of up to clients times r in a round and they add up over rounds. A client
may have missed any of them: the server therefore sends the whole sum of residuals, [out, in] in float32,
with every model. That is as many bytes down as the layers themselves have, while clients send no more than
factors.
"""

from __future__ import annotations

from atoll.strategies.lora.factors import LayerRound, Merged


def fedex(layer: LayerRound) -> Merged:
    """The mean factors; the rest of the mean product is added to the frozen weight."""
    residual = layer.side_by_side.product - layer.mean.product
    return Merged(layer.mean, layer.base + layer.scaling * residual)
