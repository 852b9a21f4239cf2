"""FLANDERS (Gabrielli et al. 2023, arXiv 2303.16668): leaves out updates that clients' pasts do not predict.

Theta_t [numbers, clients] has the local models of round t, a column a client. Those of honest clients are
predictable from round to round, by a matrix autoregressive model of order 1,

    Theta_t = A Theta_{t-1} B + noise,    A, B = argmin sum_s || Theta_s - A Theta_{s-1} B ||_F^2

over the pairs of rounds in a window of the past (`matrix_autoregression.py`). A client's score is the L2
distance of its local model from its column of the forecast A Theta_{t-1} B. Of n clients the n - f with the
least scores are kept, f being `hostile`, and a rule merges their deltas. Of equal scores the first counts.

A client that is left out gets the merged model in its column for that round, so that its update has no
influence on later forecasts. Here the same holds for clients that took no part or are new; in the paper all
clients take part in every round. The forecast of the first round is the model that clients received, that of
the second round what they sent in the first.
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
"""The name, in the state, of the global models after the window's rounds, [rounds, numbers]."""
PREFIX = "local."
"""The prefix, before a client's name in the state, of its column's models, [rounds, numbers]."""


@dataclass(frozen=True)
class Flanders:
    """Move by `lr` times the rule's merge of the deltas that clients' pasts predict best."""

    options: FlandersOptions
    lr: float = 1.0
    seed: int = 0

    def begin(self, model: Tensors) -> State:
        return {}

    def plan(self, state: State, round: int) -> Plan:
        return {}

    def merge(self, model: Tensors, updates: Sequence[Update], state: State) -> tuple[Tensors, State]:
        """As `Strategy.merge`.

        Raises:
            InconsistentUpdates: there are no more updates than `hostile`.
        """
        clients, rows = list(clients_of(updates)), rows_to_merge(model, updates, self.options)
        looked_at = self._looked_at(rows.shape[1])
        received = flat(model)[looked_at]
        local = received + rows[:, looked_at]
        expected = received.expand_as(local)
        if MERGED in state:
            expected = forecast(past_of(clients, state), self.options.ridge, self.options.iterations)
        scores = torch.linalg.vector_norm(local - expected, dim=1)
        honest = sorted(scores.argsort(stable=True)[: len(rows) - self.options.hostile].tolist())
        merged = moved_by(model, self._ruled(rows[honest]), self.lr)
        sent = {clients[i]: local[i] for i in honest}
        return merged, after_round(state, sent, flat(merged)[looked_at], self.options.window)

    def _looked_at(self, numbers: int) -> torch.Tensor:
        """The sorted places of the numbers that forecasts use, drawn from the job's seed."""
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
    """The clients' models in the window, [rounds, clients, numbers]; the merged ones for unknown clients."""
    merged = state[MERGED]
    columns = [cast(torch.Tensor, state.get(PREFIX + name, merged)) for name in clients]
    return torch.stack(columns, dim=1)


def after_round(state: State, sent: Mapping[str, torch.Tensor], merged: torch.Tensor, window: int) -> State:
    """The state after one more round, without rounds that are out of the window.

    `sent` has the local models [numbers] of the clients that were kept, `merged` [numbers] the merged model.
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
    differing = {
        name: column
        for name, column in columns.items()
        if not torch.equal(cast(torch.Tensor, column), common)
    }
    return {MERGED: common, **differing}
