"""Contributions of a run's clients, measured in each round by merging the updates of subsets of its clients.

The value of a coalition of a round's clients is the task's primary metric, on the server's test set, of the
model that results from merging only their updates; for no clients, that of the model before the round.
Nothing is retrained. A client's contribution to the run is the sum over its rounds (Song et al. 2019,
multi-round reconstruction). A metric for which lower is better is negated, so that more is always better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan

from atoll.errors import ConfigError
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.protocol.stacked_updates import clients_of, taken
from atoll.report.run_result import ClientContribution, Contributions, RoundExtras
from atoll.server.contributions.leave_one_out import Coalition, leave_one_out
from atoll.server.contributions.shapley import shapley
from atoll.server.roster import MOST_CLIENTS
from atoll.server.rounds.aggregation import merged
from atoll.server.rounds.run_state import Run, RunSetup
from atoll.tasks.metric_values import defined, lower_is_better


@dataclass
class RoundGame:
    """The value of each coalition of a round's clients; each is measured at most once."""

    run: Run
    updates: Sequence[Update]
    round: int
    known: dict[Coalition, float] = field(default_factory=dict)

    def __call__(self, coalition: Coalition) -> float:
        """The value of the clients with these indices in `updates`; NaN where the metric is undefined."""
        if coalition not in self.known:
            self.known[coalition] = self._measured(coalition)
        return self.known[coalition]

    def _measured(self, coalition: Coalition) -> float:
        state, test = self.run.state, self.run.setup.test
        assert test is not None
        model = state.tensors
        if coalition:
            model, _ = merged(self.run, taken(self.updates, coalition), self.round)
        states = state.learner.evaluate({**state.learner.client_tensors, **model}, test)
        metric = state.learner.task.primary_metric
        value = state.learner.compute(states).get(metric)
        return nan if value is None else -value if lower_is_better(metric) else value


def round_contributions(run: Run, updates: Sequence[Update], round: int) -> RoundExtras:
    """Each client's contribution to this round, for its log line; empty if the job doesn't ask for it.

    A contribution is None where it is undefined. Must be called before the round's updates are merged.
    """
    job = run.setup.job
    if job.evaluate.contributions is None:
        return {}
    clients = clients_of(updates)
    game, players = RoundGame(run, updates, round), len(clients)
    if job.evaluate.contributions == "leave-one-out":
        values = leave_one_out(players, game) if players else []
    else:
        values = shapley(
            players, game, permutations=job.evaluate.permutations_taken,
            truncation=job.evaluate.truncation_taken, generator=stream(job.seed, "shapley", round),
        )  # fmt: skip
    return {"contributions": dict(zip(clients, map(defined, values), strict=True))}


def run_contributions(run: Run) -> Contributions | None:
    """Each client's contribution summed over rounds, for `result.json`; None if the job doesn't ask for it.

    `rounds` is the number of rounds in which the client sent an update, `undefined` the number of these
    without a value. With more than `MOST_CLIENTS` clients only those that took part are listed.
    """
    setup, method = run.setup, run.setup.job.evaluate.contributions
    if method is None:
        return None
    rounds = [line["contributions"] for line in run.state.log]
    everybody = setup.population if len(setup.population) <= MOST_CLIENTS else ()
    names = sorted({*everybody, *(name for values in rounds for name in values)})
    values = {name: [of_round[name] for of_round in rounds if name in of_round] for name in names}
    metric = run.state.learner.task.primary_metric
    return {
        "method": method,
        "metric": metric,
        "lower_is_better": lower_is_better(metric),
        "clients": {name: _summed(of_client) for name, of_client in values.items()},
    }


def _summed(values: Sequence[float | None]) -> ClientContribution:
    known = [value for value in values if value is not None]
    return {
        "value": sum(known) if known else None,
        "rounds": len(values),
        "undefined": len(values) - len(known),
    }


def check_can_measure(setup: RunSetup) -> None:
    """Raises ConfigError if the job asks for contributions and the server has no test set to measure on."""
    if setup.job.evaluate.contributions is not None and setup.test is None:
        raise ConfigError(
            "evaluate.contributions: the server measures them on a test set of its own, and has none;"
            " expected data.test, or data.test_fraction above 0"
        )
