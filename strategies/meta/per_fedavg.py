"""Per-FedAvg, first order (Fallah et al. 2020, "Personalized Federated Learning: A Meta-Learning Approach").

It looks for the model w from which one step of gradient descent by each client's own examples leads
furthest: it minimises the even mean over clients i of F_i(w) = f_i(w - alpha grad f_i(w)), f_i being i's
loss. The gradient of F_i is (I - alpha H) grad f_i(w - alpha grad f_i(w)); the first-order form, the paper's
Per-FedAvg (FO), leaves out the Hessian H of algorithm 1. From the round's w a client takes tau local steps,
with two batches D and D' of its own in each,

    w' = w - alpha grad f_i(w; D)
    w <- w - beta grad f_i(w'; D')

and the server moves by the even mean of what they moved. alpha is `options.inner_lr`; beta is `train.lr`,
with whatever `train.optimizer` does to a gradient. The client's part is in `client/training/per_fedavg.py`.
The model is for use after a step of alpha at each client, which `evaluate.adapt = 1` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.strategies.meta.reptile import Reptile


@dataclass(frozen=True)
class PerFedAvg(Reptile):
    """Move by `lr` times the even mean of the deltas, as Reptile does, by default the whole way."""

    lr: float = 1.0
