"""Sampling in proportion to size, and the unweighted mean over the draws (Li et al. 2020, scheme I).

"On the Convergence of FedAvg on Non-IID Data", section 3.2. There are N clients with p_k = n_k / sum_j n_j,
where n_k is the number of client k's examples. A round draws K times with replacement, client k with
probability p_k each time, and takes the mean over the draws S, which may contain a client more than once:

    w <- 1 / K sum over k in S of w_k        E[1 / K sum over S of w_k] = sum_k p_k w_k

So the mean is an unbiased estimate of the mean of all clients weighted by examples (the paper's lemma 4). A
client that was drawn m times trains once and has weight m. Here n_k is the number of examples in client k's
greeting, and K is `federation.cohort`; if a drawn client sends nothing, the mean is over the other draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import clients_of, weighing
from atoll.protocol.tensors import Tensors
from atoll.server.selection.proportional import Weights, uniforms_of, with_replacement
from atoll.strategies.strategy import State


def times_drawn(sizes: Weights, uniforms: Sequence[float]) -> Counter[int]:
    """How often each client is drawn, by its index in `sizes`; one draw for each uniform number in [0, 1)."""
    return Counter(with_replacement(sizes, uniforms))


@dataclass(frozen=True)
class BySize:
    """Scheme I: samples clients in proportion to `sizes`, their examples, in the order of `names`."""

    names: Sequence[str]
    sizes: Weights
    draws: int
    seed: int

    def times(self, round: int) -> dict[str, int]:
        """How often each client of a round is drawn, by name."""
        drawn = times_drawn(self.sizes, uniforms_of(self.seed, "by-size", round, self.draws))
        return {self.names[place]: drawn[place] for place in sorted(drawn)}

    def cohort(self, state: State, round: int) -> list[str]:
        """The names of the clients that are drawn at least once, sorted."""
        return list(self.times(round))

    def after_round(self, state: State, updates: Sequence[Update], round: int) -> State:
        """The state unchanged: draws depend on the round alone."""
        return state

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        """The updates, each weighted by how often its client was drawn instead of by its examples."""
        times = self.times(round)
        return weighing(updates, [times[name] for name in clients_of(updates)]), {}

    @property
    def update_transforms(self) -> Sequence[BySize]:
        """The rule itself, which sets the updates' weights."""
        return (self,)
