"""The clients at work in an asynchronous run: the model each started from, and when it will be done.

Times are of a virtual clock, so that results don't depend on how fast a machine is. A client's duration is
what its device takes (`federation.devices`); without devices it is, as in FedBuff's experiments (Nguyen et
al. 2022), the absolute value of a standard normal number, drawn from the job's seed for each client and each
start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

import torch

from atoll.protocol.random_streams import stream
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.asynchronous.arrival_groups import ArrivalGroups
from atoll.server.rounds.participation import CohortRequest, Participation
from atoll.strategies.strategy import State

NOW, START, LANDS, MODEL = "flights.now", "flights.start.", "flights.lands.", "flights.model."
"""Names in a checkpoint: the clock; prefixes of each client's start and end, and of the stored models."""
BEGINS, STEPS, GROUP = "flights.begins.", "flights.steps.", "flights.group."
"""Further prefixes of a client's entries, where the server gives each client its number of steps."""
OF_A_CLIENT = (START, LANDS, BEGINS, STEPS, GROUP)

Task = tuple[int, int]
"""(number of merges before the client started, its local steps; 0: as many as the job says)."""


@runtime_checkable
class WorkTimes(Protocol):
    """The durations of clients' tasks."""

    def arrivals(self, call: CohortRequest) -> Sequence[float]:
        """Virtual seconds from a request to each client's reply; infinite for an unavailable client."""
        ...


@dataclass(frozen=True)
class HalfNormalTimes:
    """Durations |N(0, 1)|, without a unit, drawn anew for each client and start."""

    seed: int

    def arrivals(self, call: CohortRequest) -> Sequence[float]:
        """One duration per client of the request; it depends only on the client's name and the round."""
        return [self._of(client, call.round) for client in call.cohort]

    def _of(self, client: str, round: int) -> float:
        drawn = torch.randn(1, generator=stream(self.seed, "flight", client, round), dtype=torch.float64)
        return abs(float(drawn))


@dataclass(frozen=True)
class StepTimes:
    """Durations steps * s * exp(N(0, 1) / 10), without a unit, where s = |N(0, 1)| is fixed for each client.

    The last factor is drawn anew for each start: clients differ in speed, and each takes about as long as
    it took the last time.
    """

    seed: int

    def arrivals(self, call: CohortRequest) -> Sequence[float]:
        """One duration per client of the request, for the request's number of local steps."""
        assert call.steps is not None
        return [call.steps * self._of_a_step(client, call.round) for client in call.cohort]

    def _of_a_step(self, client: str, round: int) -> float:
        usual, other = (
            float(torch.randn(1, generator=stream(self.seed, "step", client, *at), dtype=torch.float64))
            for at in ((), (round,))
        )
        return abs(usual) * math.exp(other / 10)


@dataclass(frozen=True)
class Flight:
    """One client at work: `start` merges happened before it started, and it is done at the time `lands`.

    Where the server gives clients their numbers of local steps, `steps` is that number, `begins` the time at
    which the client started, and `group` the number of its group, 0 for a client in none.
    """

    start: int
    lands: float
    steps: int = 0
    begins: float = 0.0
    group: int = 0

    @property
    def task(self) -> Task:
        """What the client was asked to do."""
        return self.start, self.steps


@dataclass
class Flights:
    """The clients at work, the models that they started from (by number of merges), and the clock's time."""

    now: float = 0.0
    by_client: dict[str, Flight] = field(default_factory=dict)
    models: dict[int, Tensors] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    """The clients whose updates the current round merges."""
    merges: float | None = None
    """The time at which it merges them; None: as soon as the last of them is done."""
    groups: ArrivalGroups = field(default_factory=ArrivalGroups)
    """The clients' speeds and groups, where the server gives them their numbers of local steps."""

    def begin(self, start: int, model: Tensors, arrivals: Mapping[str, float]) -> None:
        """Start clients from `model`, made by `start` merges; `arrivals` are their durations in seconds.

        A client whose duration is infinite isn't available and doesn't start.
        """
        there = {client: float(seconds) for client, seconds in arrivals.items() if math.isfinite(seconds)}
        self.by_client |= {client: Flight(start, self.now + seconds) for client, seconds in there.items()}
        if there:
            self.models[start] = model

    def due(self, count: int) -> list[str]:
        """At most `count` clients that are done first, sorted by name; of equal times the lower name wins."""
        order = sorted(self.by_client, key=lambda client: (self.by_client[client].lands, client))
        return sorted(order[:count])

    def by_task(self, clients: Sequence[str]) -> dict[Task, list[str]]:
        """These clients grouped by task; tasks in ascending order, clients in the order given."""
        tasks = sorted({self.by_client[client].task for client in clients})
        return {task: [client for client in clients if self.by_client[client].task == task] for task in tasks}

    def land(self) -> None:
        """Remove the clients in `called`, set the clock to their merge, and drop models no longer in use."""
        self.now = self._end(self.called)
        for client in self.called:
            del self.by_client[client]
        in_use = {flight.start for flight in self.by_client.values()}
        self.models = {start: model for start, model in self.models.items() if start in in_use}

    def timed(self, call: CohortRequest) -> Participation:
        """All called clients and the round's duration; a second attempt takes no virtual time."""
        end = self._end(call.cohort) if call.attempt == 1 else self.now
        return Participation(call.cohort, end - self.now)

    def _end(self, called: Sequence[str]) -> float:
        """The time at which these clients are merged."""
        ends = [self.by_client[client].lands for client in called] if self.merges is None else [self.merges]
        return max([self.now, *ends])

    def saved(self) -> State:
        """The clock, clients and models as entries of a checkpoint; empty if no client ever started."""
        if not self.by_client and not self.now:
            return {}
        state: State = {NOW: self.now, **self.groups.saved()}
        for client, flight in self.by_client.items():
            state[START + client] = float(flight.start)
            if math.isfinite(flight.lands):
                state[LANDS + client] = flight.lands
            if flight.steps:
                state |= {BEGINS + client: flight.begins, STEPS + client: float(flight.steps)}
                state[GROUP + client] = float(flight.group)
        for start, model in self.models.items():
            state |= {f"{MODEL}{start}.{name}": tensor for name, tensor in model.items()}
        return state

    def resume(self, state: State) -> State:
        """Load the entries that `saved` wrote; returns the remaining entries of the checkpoint."""
        self.now = float(state.get(NOW, 0.0))
        clients = [name.removeprefix(START) for name in state if name.startswith(START)]
        self.by_client = {client: _resumed(client, state) for client in clients}
        state = self.groups.resume(state)
        self.models = {}
        for name, tensor in state.items():
            if name.startswith(MODEL):
                start, _, of = name.removeprefix(MODEL).partition(".")
                self.models.setdefault(int(start), {})[of] = cast(torch.Tensor, tensor)
        return {n: v for n, v in state.items() if not n.startswith((NOW, MODEL, *OF_A_CLIENT))}


def _resumed(client: str, state: State) -> Flight:
    """A client's flight read from a checkpoint; without a stored end time, the end is infinite."""
    return Flight(
        start=int(float(state[START + client])),
        lands=float(state.get(LANDS + client, math.inf)),
        steps=int(float(state.get(STEPS + client, 0.0))),
        begins=float(state.get(BEGINS + client, 0.0)),
        group=int(float(state.get(GROUP + client, 0.0))),
    )
