"""A round of FedBuff or FedAsync: the first K clients to finish are merged, and the others go on training.

At most `federation.concurrency` clients are at work. A round first starts new clients from the current model
until that number is reached, then waits for the K that finish first by the virtual clock (`flights`), and
merges their updates. Merged clients are replaced only at the begin of the next round, so no client starts
from a model that is about to be replaced. A client is at work at most once at a time, and so in a buffer at
most once.

Simulated clients train only when they are due, from the stored model that they started from: the results are
the same, and a killed run loses no client's work. Real sites are asked when they start (`ahead`), and again
when a killed server is resumed.

`grouped_round` has FedCompass's rounds, which choose the clients to merge differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from atoll.job.job import Job
from atoll.protocol.messages import ASSIGNED_STEPS, Reply, Update
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import TrainRequest
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.server.rounds.aggregation import PlainRound, merge_updates, reply_transforms
from atoll.server.rounds.asynchronous.ahead import AskedAhead, AsksAhead
from atoll.server.rounds.asynchronous.flights import HalfNormalTimes, Task, WorkTimes
from atoll.server.rounds.cohort import some
from atoll.server.rounds.participation import AvailabilityModel, CohortRequest
from atoll.server.rounds.run_state import Run
from atoll.server.rounds.validation import ValidatedUpdates, Validation
from atoll.server.transport import Transport
from atoll.strategies.asynchronous.late import Drift, MergesLate
from atoll.strategies.strategy import Strategy


@dataclass(frozen=True)
class AsynchronousRound(PlainRound):
    """A round that merges updates from several starts, each transformed by the strategy's `late`."""

    late: MergesLate
    times: WorkTimes
    ahead: AskedAhead | None

    def sample(self, run: Run, round: int) -> list[str]:
        """Start clients until enough are at work; returns the names of those that finish first."""
        federation, flights = run.setup.job.federation, run.state.flights
        assert federation.cohort is not None
        starters = self.starters(run, round)
        down, up = self.bytes_per_client(run)
        arrivals = self.times.arrivals(CohortRequest(round, 1, starters, len(starters), down, up))
        flights.begin(round - 1, run.state.tensors, dict(zip(starters, arrivals, strict=True)))
        self._ask_those_at_work(run)
        if self.ahead is not None and federation.order == "arrival":
            flights.called = self.ahead.first(federation.cohort)
        else:
            flights.called = flights.due(federation.cohort)
        return flights.called

    def starters(self, run: Run, round: int) -> list[str]:
        """The idle clients to start in this round, drawn at random, sorted by name."""
        federation, flights = run.setup.job.federation, run.state.flights
        assert federation.concurrency is not None
        free = federation.concurrency - len(flights.by_client)
        idle = [name for name in run.setup.population if name not in flights.by_client]
        return some(idle, free, stream(run.setup.job.seed, "cohort", round)) if free else []

    def gather_updates(self, run: Run, names: Sequence[str], round: int, attempt: int) -> ValidatedUpdates:
        flights, updates, set_aside = run.state.flights, list[Update](), dict[str, str]()
        staleness = dict[str, int]()
        for task, members in flights.by_task(names).items():
            start, gathered = task[0], self._of_task(run, task, members, attempt)
            drift = Drift(flights.models[start], run.state.tensors)
            updates += self._transformed(run, gathered.updates, drift, round - 1 - start, round)
            set_aside |= gathered.set_aside
            staleness |= dict.fromkeys((update.client for update in gathered.updates), round - 1 - start)
        updates.sort(key=lambda update: update.client)
        return ValidatedUpdates(
            updates, dict(sorted(set_aside.items())), staleness=[staleness[u.client] for u in updates]
        )

    def _ask_those_at_work(self, run: Run) -> None:
        """Send a request to every client at work that has none yet, if the transport can do so ahead."""
        if self.ahead is None:
            return
        flights = run.state.flights
        for task, members in flights.by_task(sorted(flights.by_client)).items():
            waiting = [client for client in members if not self.ahead.has_asked(client)]
            if waiting:
                self.ahead.ask(_request(run, task), waiting, run.reply_on_disk)

    def _of_task(self, run: Run, task: Task, members: Sequence[str], attempt: int) -> ValidatedUpdates:
        """The updates of clients with the same task; each trains as in the round in which it started."""
        start, _ = task
        model = run.state.flights.models[start]
        replies: Iterable[Reply]
        if self.ahead is not None and attempt == 1:
            replies = self.ahead.take(members)
        else:
            replies = run.send(_request(run, task), members)
        for transform in self.reply_transforms:
            replies = run.on_disk(transform(replies, model))
        return self.validate(replies, members, model, start + 1)

    def close(self) -> None:
        if self.ahead is not None:
            self.ahead.close()

    def _transformed(
        self, run: Run, updates: Sequence[Update], drift: Drift, staleness: int, round: int
    ) -> Sequence[Update]:
        if isinstance(updates, StackedUpdates):
            delta = self.late.late(updates.delta, drift, staleness)
            return list(replace(updates, delta=delta, round=round))
        return [
            run.reply_on_disk(
                replace(update, delta=self.late.late(update.delta, drift, staleness), round=round)
            )
            for update in updates
        ]

    def merge(self, run: Run, gathered: ValidatedUpdates, round: int) -> None:
        merge_updates(run, gathered.updates, round)
        run.state.flights.land()


def _request(run: Run, task: Task) -> TrainRequest:
    """The request to train from the model after `task[0]` merges, with `task[1]` local steps if not 0."""
    start, steps = task
    round = start + 1
    plan = dict(run.setup.strategy.plan(run.state.strategy_state, round))
    if steps:
        plan[ASSIGNED_STEPS] = float(steps)
    return TrainRequest(**run.request_origin(round), tensors=run.state.flights.models[start], plan=plan)


def asynchronous_round(
    job: Job, carrier: Transport, strategy: Strategy, clock: AvailabilityModel
) -> AsynchronousRound:
    """The rounds of a FedBuff or FedAsync job; durations come from `clock` where it simulates devices."""
    ahead = AskedAhead(carrier, job.federation.round_timeout) if isinstance(carrier, AsksAhead) else None
    times = clock if isinstance(clock, WorkTimes) else HalfNormalTimes(job.seed)
    late = cast(MergesLate, strategy)
    return AsynchronousRound(reply_transforms(job), Validation.of(job), late, times, ahead)
