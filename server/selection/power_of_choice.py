"""Power-of-choice (Cho et al. 2020, rpow-d): draws candidates by size, and takes those with large losses.

"Client Selection in Federated Learning: Convergence Analysis and Power-of-Choice Selection Strategies",
sections 3 and 5. In each round the server

1. draws d candidates without replacement, client k with probability proportional to its examples n_k;
2. takes the m candidates with the largest F_k(w), the loss of the model w at client k;
3. averages their models with equal weights, w <- 1 / m sum_k w_k.

Of the paper's variants this is rpow-d, which needs no request for losses: F_k is client k's mean training
loss over all local steps of its last round, which every update carries. It is infinite for a client that
hasn't sent an update, so that every client is tried once. Of equal losses the candidate drawn first wins; the
paper doesn't say. d is `federation.candidates`, m is `federation.cohort`. With d = m losses have no effect;
the larger d is, the more the model is biased towards clients with large losses, and this bias doesn't vanish.
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
"""Prefix, in the state, of a client's mean training loss in its last round."""


def largest(candidates: Sequence[int], losses: Sequence[float], count: int) -> list[int]:
    """The `count` candidates with the largest losses, sorted; of equal losses the first candidate wins.

    `candidates` are client indices, `losses` their last losses, infinite where none is known.

    >>> largest([7, 3, 5, 1], [0.5, math.inf, 0.9, 0.9], 2)
    [3, 5]
    """
    ranked = sorted(range(len(candidates)), key=lambda i: -losses[i])
    return sorted(candidates[i] for i in ranked[:count])


@dataclass(frozen=True)
class PowerOfChoice:
    """Samples `count` of `candidates` clients by loss; `sizes` are examples, in the order of `names`."""

    names: Sequence[str]
    sizes: Weights
    candidates: int
    count: int
    seed: int
    weights_are_chosen: bool
    """Whether the job chooses the updates' weights; otherwise all have the same."""

    def cohort(self, state: State, round: int) -> list[str]:
        """The names of the round's clients, sorted; the same for the same state and round."""
        uniforms = uniforms_of(self.seed, "power-of-choice", round, self.candidates)
        drawn = without_replacement(self.sizes, uniforms)
        losses = [float(state.get(LOSS + self.names[place], math.inf)) for place in drawn]
        return [self.names[place] for place in largest(drawn, losses, self.count)]

    def after_round(self, state: State, updates: Sequence[Update], round: int) -> State:
        """The state with the mean training losses of the round's clients."""
        return state | {LOSS + name: loss for name, loss in mean_losses(updates).items()}

    @property
    def update_transforms(self) -> Sequence[MergeWeights]:
        """Equal weights for all updates; none where the job chooses the weights."""
        return () if self.weights_are_chosen else (MergeWeights(FederationSection(weights="equal")),)
