"""The mean of each factor on its own (Zhang et al. 2024, "Towards Building the Federated GPT", FedIT).

With symbols as in `factors.py`: B <- sum_i w_i B_i and A <- sum_i w_i A_i. Both travel, and whatever
strategy merges other tensors merges these. What comes out is B A, which isn't sum_i w_i B_i A_i unless all
A_i or all B_i are the same; the difference is the error that every round reports. It grows with how far
clients drift apart.
"""

from __future__ import annotations

from atoll.strategies.lora.factors import BASE, LayerRound, Merged


def average(layer: LayerRound) -> Merged:
    """The factors as the strategy has merged them."""
    return Merged(layer.mean)


def is_trained(name: str, round: int) -> bool:
    """Whether a tensor is trained, and comes back from clients, in a round: all but what the server adds."""
    return not name.endswith(BASE)
