"""signSGD with majority vote (Bernstein et al. 2018, "signSGD: Compressed Optimisation for Non-Convex
Problems").

Client m sends the sign of each number of its delta d_m, in one bit; the server takes a step of length eta in
each number, to the side that most clients are on:

    x <- x + eta sign(sum_m sign(d_m))

With one local step of SGD d_m is a multiple of minus the client's gradient, and this is algorithm 1 of the
paper; with more steps clients vote on where they went. eta is `lr`. A number whose votes are equal stays. A
vote counts the same however far a client went, so where honest clients agree, fewer hostile ones change
nothing (Bernstein et al. 2019, "signSGD with Majority Vote is Communication Efficient And Fault Tolerant").
That paper's momentum at the clients (Signum) is not here.

Deltas arrive as `federation.compression = "sign"` has them. Their scales are not used, but that a tensor
whose scale is 0, which didn't move at all, doesn't vote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import delta_of, moved
from atoll.strategies.strategy import Plan, State


@dataclass(frozen=True)
class SignSgd:
    """Move each number by `lr` to the side that most deltas point to."""

    lr: float = 1e-3

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        votes = majority(model, updates)
        return moved(model, {name: self.lr * vote for name, vote in votes.items()}), state


def majority(model: Tensors, updates: Sequence[Update]) -> Tensors:
    """The sign that most deltas have in each number, or 0 where as many have the other, in float64.

    >>> deltas = [[2.0, -1.0], [0.1, 4.0], [-9.0, 0.0]]
    >>> updates = [Update(str(m), 1, {"w": torch.tensor(d)}, 5) for m, d in enumerate(deltas)]
    >>> majority({"w": torch.zeros(2)}, updates)
    {'w': tensor([1., 0.], dtype=torch.float64)}
    """
    votes = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.items()}
    for place in range(len(updates)):
        for name, values in delta_of(updates, place).items():
            votes[name] += values.sign()
    return {name: total.sign() for name, total in votes.items()}
