"""Chances in proportion to size, and the even mean of those drawn (Li et al. 2020, scheme I).

"On the Convergence of FedAvg on Non-IID Data", section 3.2. N clients with p_k = n_k / sum_j n_j, where n_k
is the number of client k's examples. A round draws K times with replacement, client k with chance p_k each
time, and merges evenly over the draws S, in which a client may stand more than once:

    w <- 1 / K sum over k in S of w_k        E[1 / K sum over S of w_k] = sum_k p_k w_k

so the mean is that of all clients weighted by examples, without bias (the paper's lemma 4). A client that was
drawn m times trains once and weighs m. Here n_k is what client k's greeting says that it holds, and
K is `federation.cohort`; where a client that was drawn sends nothing, the mean is over the other draws.
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
    """How often each client is drawn, by its place; one draw a uniform number."""
    return Counter(with_replacement(sizes, uniforms))


@dataclass(frozen=True)
class BySize:
    """Scheme I for the clients of a run, in the order of their names; `sizes` are their examples."""

    names: Sequence[str]
    sizes: Weights
    draws: int
    seed: int

    def times(self, round: int) -> dict[str, int]:
        """How often each client of a round was drawn, by name."""
        drawn = times_drawn(self.sizes, uniforms_of(self.seed, "by-size", round, self.draws))
        return {self.names[place]: drawn[place] for place in sorted(drawn)}

    def cohort(self, state: State, round: int) -> list[str]:
        """As in the seam."""
        return list(self.times(round))

    def after_round(self, state: State, updates: Sequence[Update], round: int) -> State:
        """As in the seam: draws depend on the round alone."""
        return state

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        """The updates with times drawn in the place of their examples."""
        times = self.times(round)
        return weighing(updates, [times[name] for name in clients_of(updates)]), {}

    @property
    def update_transforms(self) -> Sequence[BySize]:
        """What happens to a round's updates before they are merged."""
        return (self,)
