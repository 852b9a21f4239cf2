"""pFedMe (T. Dinh et al. 2020, "Personalized Federated Learning with Moreau Envelopes"), algorithm 1.

Client i has a model of its own theta_i beside the shared w: theta_i(w) minimises f_i(theta) + lambda / 2
||theta - w||^2, f_i being i's loss, and the Moreau envelope F_i(w) is that minimum. The shared w minimises
the even mean of the F_i, whose gradient at w is lambda (w - theta_i(w)). From the round's w client i takes
R local steps, each with a batch D, for which K steps of plain gradient descent from w come near theta_i(w):

    theta <- theta - alpha (grad f_i(theta; D) + lambda (theta - w)),    K times, from theta = w
    w <- w - eta lambda (w - theta)

and the server moves to (1 - beta) w + beta times the even mean of what they arrived at. lambda is
`options.pull`, alpha `options.inner_lr`, K `options.inner_steps`, beta `lr`; R follows from `train.epochs`
and `train.batch_size`, and eta is `train.lr`, with whatever `train.optimizer` does to a gradient. The paper
leaves open where theta begins in each of the R steps; here it is w, so that a client keeps nothing. The
client's part is in `client/training/pfedme.py`; theta_i(w) is what `evaluate.adapt` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from atoll.strategies.meta.reptile import Reptile


@dataclass(frozen=True)
class PFedMe(Reptile):
    """Move by `lr` times the even mean of the deltas, as Reptile does, by default the whole way."""

    lr: float = 1.0
