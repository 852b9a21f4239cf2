"""The mean of each factor on its own (Zhang et al. 2024, "Towards Building the Federated GPT", FedIT).

With symbols as in `factors.py`: B <- sum_i w_i B_i and A <- sum_i w_i A_i. Clients send both, and the job's
strategy merges them like any tensor. The merged product B A differs from sum_i w_i B_i A_i unless all A_i or
all B_i are the same; every round reports the difference as its error, which grows as clients drift apart.
"""

from __future__ import annotations

from atoll.strategies.lora.factors import BASE, LayerRound, Merged


def average(layer: LayerRound) -> Merged:
    """The factors as the strategy has merged them."""
    return Merged(layer.mean)


def is_trained(name: str, round: int) -> bool:
    """Whether clients train and send a tensor in a round: all but what the server adds to weights."""
    return not name.endswith(BASE)
