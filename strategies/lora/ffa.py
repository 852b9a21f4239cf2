"""FFA-LoRA (Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning").

A is drawn from the job's seed, the same everywhere, and frozen at its start: A_i = A for all clients and
rounds. Only B is trained, and only B travels, half of what both would take. With symbols as in `factors.py`

    sum_i w_i B_i A = (sum_i w_i B_i) A

so that the mean of B is exact. The merged model is linear in what clients send: a secure sum, clipping and
noise mean for it what they mean for any weight, while noise on both factors would be multiplied with
itself. Nothing is left to do in the merge; A just isn't among the tensors that are tuned
(`atoll/learning/trainable.py`).
"""

from __future__ import annotations

from atoll.strategies.lora.average import average, is_trained

__all__ = ["average", "is_trained"]
