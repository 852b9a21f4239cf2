"""FLANDERS (Gabrielli et al. 2023, arXiv 2303.16668): what clients' pasts don't lead to is set aside.

Theta_t [numbers, clients] has the local models of round t, a column a client. Those of honest clients are
predictable from round to round, by a matrix autoregressive model of order 1,

    Theta_t = A Theta_{t-1} B + noise,    A, B = argmin sum_s || Theta_s - A Theta_{s-1} B ||_F^2

over the pairs of rounds in a window of the past (`matrix_autoregression.py`). A client's score is the L2
distance of what it sent to its column of the forecast A Theta_{t-1} B. Of n clients the n - f with the
least scores are kept, f being `hostile`, and a rule merges their deltas. Of equal scores the first counts.

Who was set aside has the merged model for that round in its column, so that what it sent leads to nothing.
So it is, here, with who took no part or is new; the authors have all clients in every round. In the first
round the forecast is the model that clients received, in the second one what they sent in the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.protocol.stacked_updates import clients_of
from atoll.protocol.tensors import Tensors
from atoll.strategies.options import FlandersOptions, GeometricMedianOptions
from atoll.strategies.robust.coordinate_median import coordinate_median
from atoll.strategies.robust.geometric_median import geometric_median
from atoll.strategies.robust.matrix_autoregression import forecast
from atoll.strategies.robust.rows import flat, moved_by, rows_to_merge
from atoll.strategies.strategy import Plan, State

MERGED = "merged"
"""In the state: the numbers of the global model after each round of the window, [rounds, numbers]."""
PREFIX = "local."
"""Before a client's name in the state: those of its local models, or of the global one, likewise."""


@dataclass(frozen=True)
class Flanders:
    """Move by `lr` times what the rule makes of the deltas whose clients' pasts lead to them."""

    options: FlandersOptions
    lr: float = 1.0
    seed: int = 0

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As in the seam.

        Raises:
            InconsistentUpdates: there are fewer than one more than hostile clients.
        """
        clients, rows = list(clients_of(updates)), rows_to_merge(model, updates, self.options)
        looked_at = self._looked_at(rows.shape[1])
        received = flat(model)[looked_at]
        local = received + rows[:, looked_at]
        expected = received.expand_as(local)
        if MERGED in state:
            expected = forecast(past_of(clients, state), self.options.ridge, self.options.iterations)
        scores = torch.linalg.vector_norm(local - expected, dim=1)
        kept = sorted(scores.argsort(stable=True)[: len(rows) - self.options.hostile].tolist())
        merged = moved_by(model, self._ruled(rows[kept]), self.lr)
        sent = {clients[i]: local[i] for i in kept}
        return merged, after_round(state, sent, flat(merged)[looked_at], self.options.window)

    def _looked_at(self, numbers: int) -> torch.Tensor:
        """Which of a model's numbers are looked at, in their order; the job's seed draws them."""
        if numbers <= self.options.sampled:
            return torch.arange(numbers)
        drawn = torch.randperm(numbers, generator=stream(self.seed, "flanders"))
        return drawn[: self.options.sampled].sort().values

    def _ruled(self, rows: torch.Tensor) -> torch.Tensor:
        match self.options.rule:
            case "coordinate-median":
                return coordinate_median(rows)
            case "geometric-median":
                usual = GeometricMedianOptions()
                return geometric_median(rows, usual.smoothing, usual.iterations)
            case _:
                return rows.mean(dim=0)


def past_of(clients: Sequence[str], state: State) -> torch.Tensor:
    """The window's rounds of these clients, [rounds, clients, numbers]; of who has none, merged models."""
    merged = state[MERGED]
    columns = [cast(torch.Tensor, state.get(PREFIX + name, merged)) for name in clients]
    return torch.stack(columns, dim=1)


def after_round(state: State, sent: Mapping[str, torch.Tensor], merged: torch.Tensor, window: int) -> State:
    """The state with one round more, and without what is out of the window.

    `sent` has the local models [numbers] of those who were kept, `merged` the model that was made of them.
    """
    before = cast(torch.Tensor, state.get(MERGED, merged.new_empty(0, len(merged))))

    def lengthened(column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return torch.cat([column, row.unsqueeze(0)])[-window:]

    common = lengthened(before, merged)
    names = {name.removeprefix(PREFIX) for name in state if name.startswith(PREFIX)} | sent.keys()
    columns: State = {
        PREFIX + name: lengthened(
            cast(torch.Tensor, state.get(PREFIX + name, before)), sent.get(name, merged)
        )
        for name in sorted(names)
    }
    told = {name: own for name, own in columns.items() if not torch.equal(cast(torch.Tensor, own), common)}
    return {MERGED: common, **told}
