"""pFedMe (T. Dinh et al. 2020, "Personalized Federated Learning with Moreau Envelopes"), algorithm 1.

Client i has a personal model theta_i beside the shared w: theta_i(w) minimises f_i(theta) + lambda / 2
||theta - w||^2, f_i being i's loss, and the Moreau envelope F_i(w) is that minimum. The shared w minimises
the unweighted mean of the F_i, whose gradient at w is lambda (w - theta_i(w)). From the round's w client i
takes R local steps, each with a batch D; K steps of plain gradient descent from w approximate theta_i(w):

    theta <- theta - alpha (grad f_i(theta; D) + lambda (theta - w)),    K times, from theta = w
    w <- w - eta lambda (w - theta)

and the server moves to (1 - beta) w + beta times the unweighted mean of the clients' w. lambda is
`options.pull`, alpha `options.inner_lr`, K `options.inner_steps`, beta `lr`; R follows from `train.epochs`
and `train.batch_size`, and eta is `train.lr`, with steps of `train.optimizer`. The paper leaves open where
theta starts in each of the R steps; here it is w, so that a client stores nothing. The client's part is in
`client/training/pfedme.py`; `evaluate.adapt` measures theta_i(w).
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.strategies.meta.reptile import Reptile


@dataclass(frozen=True)
class PFedMe(Reptile):
    """Move by `lr` (by default 1) times the unweighted mean of the deltas, as Reptile does."""

    lr: float = 1.0
