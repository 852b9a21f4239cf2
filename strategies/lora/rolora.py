"""RoLoRA (Chen et al. 2024, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA").

In odd rounds clients train and send B, with A as the server has it; in even rounds A, with B as it stands.
With symbols as in `factors.py`, one of the factors is the same at all clients in every round, and therefore

    sum_i w_i B_i A = (sum_i w_i B_i) A    and    sum_i w_i B A_i = B (sum_i w_i A_i)

so that the mean of the trained factor is exact, at half of the bytes up, and A is trained too, unlike in
FFA-LoRA. B comes first: it is zero at the start, and until it moves A has no gradient. Other trained tensors,
such as a head, are trained in every round.
"""

from __future__ import annotations

from atoll.strategies.lora.average import average, is_trained
from atoll.strategies.lora.factors import A, B

__all__ = ["alternates", "average"]


def alternates(name: str, round: int) -> bool:
    """Whether clients train and send a tensor in a round, which counts from 1."""
    resting = A if round % 2 else B
    return is_trained(name, round) and not name.endswith(resting)
