"""FFA-LoRA (Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning").

A is drawn from the job's seed, the same everywhere, and stays frozen: A_i = A for all clients and rounds.
Only B is trained and sent, half of the bytes of both. With symbols as in `factors.py`

    sum_i w_i B_i A = (sum_i w_i B_i) A

so that the mean of B is exact. The merged model is linear in what clients send, so secure sums, clipping and
noise act on B as on any weight, while noise on both factors would be multiplied with itself. The merge itself
needs no code: A is not among the trained tensors (`atoll/learning/trainable.py`).
"""

from __future__ import annotations

from atoll.strategies.lora.average import average, is_trained

__all__ = ["average", "is_trained"]
