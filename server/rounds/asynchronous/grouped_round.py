"""A round of FedCompass: each starting client gets a number of local steps; a round merges one group.

Speeds are measured by the virtual clock, or with `federation.order = "arrival"` and real sites by the
server's own clock, which doesn't count the time in which the server is stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from atoll.job.job import Job
from atoll.server.rounds.asynchronous.flights import Flight, Flights, StepTimes, WorkTimes
from atoll.server.rounds.asynchronous.round import AsynchronousRound, asynchronous_round
from atoll.server.rounds.participation import AvailabilityModel, CohortRequest
from atoll.server.rounds.run_state import Run
from atoll.server.rounds.validation import ValidatedUpdates
from atoll.server.transport import Transport
from atoll.strategies.options import FedCompassOptions
from atoll.strategies.strategy import Strategy


@dataclass
class ServerClock:
    """The seconds that a run has taken so far, including those before it was resumed."""

    begin: float | None = None

    def read(self, before: float) -> float:
        """The seconds until now; `before` is their number at the time the run was resumed."""
        if self.begin is None:
            self.begin = time.monotonic() - before
        return time.monotonic() - self.begin


@dataclass(frozen=True)
class GroupedRound(AsynchronousRound):
    """A round that merges the updates of one group, or of one client that is late or in no group."""

    options: FedCompassOptions
    clock: ServerClock = field(default_factory=ServerClock)
    done_at: dict[str, float] = field(default_factory=dict)
    """The server's time at which each client finished; only clients that aren't merged yet."""

    def sample(self, run: Run, round: int) -> list[str]:
        flights, by_arrival = run.state.flights, self._goes_by_arrival(run)
        if by_arrival:
            flights.now = self.clock.read(flights.now)
        self._start(run, self.starters(run, round), round)
        self._ask_those_at_work(run)
        if by_arrival and self.ahead is not None and flights.by_client:
            self.ahead.until(lambda done: self._may_merge(flights, done))
        flights.called, end = flights.groups.next_merge(flights.by_client)
        flights.merges = end if flights.called else None
        return flights.called

    def _goes_by_arrival(self, run: Run) -> bool:
        return self.ahead is not None and run.setup.job.federation.order == "arrival"

    def _start(self, run: Run, starters: Sequence[str], round: int) -> None:
        """Start each available client with its number of steps and its group."""
        flights, (down, up) = run.state.flights, self.bytes_per_client(run)
        for client in flights.groups.in_order(starters):
            steps, number, group = flights.groups.assigned(
                client, flights.now, flights.by_client, self.options
            )
            [seconds] = self.times.arrivals(CohortRequest(round, 1, [client], 1, down, up, steps))
            if math.isfinite(seconds):
                flights.groups.open(number, group)
                flights.begin(round - 1, run.state.tensors, {client: seconds})
                flight = flights.by_client[client]
                flights.by_client[client] = replace(flight, steps=steps, begins=flights.now, group=number)

    def _may_merge(self, flights: Flights, done: Collection[str]) -> bool:
        """Whether the next merge is due by the server's clock, given the clients that are done."""
        now = self.clock.read(flights.now)
        for client in done:
            self.done_at.setdefault(client, now)
        flights.by_client = {
            client: self._landed(client, flight) for client, flight in flights.by_client.items()
        }
        return flights.groups.next_merge(flights.by_client)[1] <= now

    def _landed(self, client: str, flight: Flight) -> Flight:
        return replace(flight, lands=self.done_at.get(client, math.inf))

    def gather_updates(self, run: Run, names: Sequence[str], round: int, attempt: int) -> ValidatedUpdates:
        gathered = super().gather_updates(run, names, round, attempt)
        at_work = run.state.flights.by_client
        return replace(gathered, assigned_steps={name: at_work[name].steps for name in names})

    def merge(self, run: Run, gathered: ValidatedUpdates, round: int) -> None:
        flights = run.state.flights
        flights.groups.note(flights.called, flights.by_client)
        super().merge(run, gathered, round)
        flights.groups.keep_groups_of(flights.by_client)
        for client in flights.called:
            self.done_at.pop(client, None)


def grouped_round(
    job: Job, carrier: Transport, strategy: Strategy, clock: AvailabilityModel, options: FedCompassOptions
) -> GroupedRound:
    """The rounds of a FedCompass job; clients' durations come from `clock` where it simulates devices."""
    plain = asynchronous_round(job, carrier, strategy, clock)
    times = clock if isinstance(clock, WorkTimes) else StepTimes(job.seed)
    return GroupedRound(plain.reply_transforms, plain.validate, plain.late, times, plain.ahead, options)
