"""Per-FedAvg, first order (Fallah et al. 2020, "Personalized Federated Learning: A Meta-Learning Approach").

It trains a model w that is good after one gradient step on a client's own examples: it minimises the
unweighted mean over clients i of F_i(w) = f_i(w - alpha grad f_i(w)), f_i being i's loss. The gradient of F_i
is (I - alpha H) grad f_i(w - alpha grad f_i(w)); the first-order form, the paper's Per-FedAvg (FO), leaves
out the Hessian H of algorithm 1. From the round's w a client takes tau local steps, with two batches D and D'
of its own in each,

    w' = w - alpha grad f_i(w; D)
    w <- w - beta grad f_i(w'; D')

and the server moves by the unweighted mean of the deltas. alpha is `options.inner_lr`; beta is `train.lr`,
with steps of `train.optimizer`. The client's part is in `client/training/per_fedavg.py`. Each client uses the
model after one step of alpha, which `evaluate.adapt = 1` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.strategies.meta.reptile import Reptile


@dataclass(frozen=True)
class PerFedAvg(Reptile):
    """Move by `lr` (by default 1) times the unweighted mean of the deltas, as Reptile does."""

    lr: float = 1.0
