"""Of candidates drawn by size, those with the largest losses (Cho et al. 2020, power-of-choice, rpow-d).

"Client Selection in Federated Learning: Convergence Analysis and Power-of-Choice Selection Strategies",
sections 3 and 5. In each round the server

1. draws d candidates without replacement, client k with chance p_k = n_k / sum_j n_j of those that are left;
2. takes the m candidates with the largest F_k(w), client k's loss of the model w;
3. merges their models evenly, w <- 1 / m sum_k w_k.

Of the paper's variants this is rpow-d, which asks nobody for a loss: F_k is client k's mean training loss in
its last round, over all its local steps, which every update brings anyway. It is infinite for a client that
has not sent any, so that everybody is tried once. Of equal losses the first that were drawn count, of which
the paper says nothing. d is `federation.candidates`, m is `federation.cohort`. With d = m losses play no
part; the larger d is, the more the model leans to clients for whom it is bad: a bias that doesn't vanish.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from atoll.job.federation import FederationSection
from atoll.protocol.messages import Update
from atoll.server.rounds.aggregation import MergeWeights
from atoll.server.selection.proportional import Weights, uniforms_of, without_replacement
from atoll.strategies.mean import mean_losses
from atoll.strategies.strategy import State

LOSS = "loss."
"""Before a client's name in the state: its mean training loss in its last round."""


def largest(candidates: Sequence[int], losses: Sequence[float], count: int) -> list[int]:
    """The places of the `count` candidates with the largest losses, in order; of equal ones the first count.

    `losses` are the candidates' last ones, infinite where none is known.

    >>> largest([7, 3, 5, 1], [0.5, math.inf, 0.9, 0.9], 2)
    [3, 5]
    """
    ranked = sorted(range(len(candidates)), key=lambda i: -losses[i])
    return sorted(candidates[i] for i in ranked[:count])


@dataclass(frozen=True)
class PowerOfChoice:
    """The rule for the clients of a run, in the order of their names; `sizes` are their examples."""

    names: Sequence[str]
    sizes: Weights
    candidates: int
    count: int
    seed: int
    weights_are_chosen: bool
    """Whether the job says what updates weigh; otherwise they weigh the same."""

    def cohort(self, state: State, round: int) -> list[str]:
        """As in the seam."""
        uniforms = uniforms_of(self.seed, "power-of-choice", round, self.candidates)
        drawn = without_replacement(self.sizes, uniforms)
        losses = [float(state.get(LOSS + self.names[place], math.inf)) for place in drawn]
        return [self.names[place] for place in largest(drawn, losses, self.count)]

    def after_round(self, state: State, updates: Sequence[Update], round: int) -> State:
        """As in the seam: the losses that came with the round's updates are the last ones."""
        return state | {LOSS + name: loss for name, loss in mean_losses(updates).items()}

    @property
    def update_transforms(self) -> Sequence[MergeWeights]:
        """What happens to a round's updates before they are merged."""
        return () if self.weights_are_chosen else (MergeWeights(FederationSection(weights="equal")),)
