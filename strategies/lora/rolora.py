"""RoLoRA (Chen et al. 2024, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA").

In odd rounds clients train and send B, with A as the server has it; in even rounds A, with B as it stands.
With symbols as in `factors.py`, one of the factors is the same at all clients in every round, and therefore

    sum_i w_i B_i A = (sum_i w_i B_i) A    and    sum_i w_i B A_i = B (sum_i w_i A_i)

so that the mean of what was trained is exact, at half of the bytes up, and A learns too, which FFA-LoRA's
never does. B comes first: it is zero at the start, and A has no gradient before it moves. What else is
tuned, such as a head, is trained in every round.
"""

from __future__ import annotations

from atoll.strategies.lora.average import average, is_trained
from atoll.strategies.lora.factors import A, B

__all__ = ["alternates", "average"]


def alternates(name: str, round: int) -> bool:
    """Whether a tensor is trained, and comes back from clients, in a round, which counts from 1."""
    resting = A if round % 2 else B
    return is_trained(name, round) and not name.endswith(resting)
