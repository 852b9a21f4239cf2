"""Which clients are at work, since which model, and when each will be done by a virtual clock.

The clock is virtual so that bits don't depend on how fast a machine is: how long a client takes is either
what its device takes (`federation.devices`) or, as in FedBuff's experiments (Nguyen et al. 2022), the
absolute value of a standard normal number, drawn from the job's seed for each client and each start.
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
"""Names in a checkpoint: the clock; by client its start and its end; by number of merges the models."""
BEGINS, STEPS, GROUP = "flights.begins.", "flights.steps.", "flights.group."
"""The same, where the server gives each client its number of steps: by client."""
OF_A_CLIENT = (START, LANDS, BEGINS, STEPS, GROUP)

Task = tuple[int, int]
"""What a client is asked: (number of merges before it started, local steps or 0 for what the job says)."""


@runtime_checkable
class WorkTimes(Protocol):
    """How long clients take."""

    def arrivals(self, call: CohortRequest) -> Sequence[float]:
        """Virtual seconds from a call to each client's reply; infinite for one that isn't there."""
        ...


@dataclass(frozen=True)
class HalfNormalTimes:
    """|N(0, 1)| for each client and start, in no unit."""

    seed: int

    def arrivals(self, call: CohortRequest) -> Sequence[float]:
        """A number for each client of the call, which depends on its name and on the round alone."""
        return [self._of(client, call.round) for client in call.cohort]

    def _of(self, client: str, round: int) -> float:
        drawn = torch.randn(1, generator=stream(self.seed, "flight", client, round), dtype=torch.float64)
        return abs(float(drawn))


@dataclass(frozen=True)
class StepTimes:
    """|N(0, 1)| for each local step of a client, in no unit, times exp(N(0, 1) / 10) for each of its starts.

    So clients differ in speed, and each takes about as long as it last took.
    """

    seed: int

    def arrivals(self, call: CohortRequest) -> Sequence[float]:
        """Seconds of each client of the call for its number of local steps."""
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
    """One client at work: after how many merges it started, and when it is done.

    Where the server gives clients their numbers of local steps, it has that number, when the client began by
    the clock, and the number of the group that shall be done together; 0 for one of whom no speed is known.
    """

    start: int
    lands: float
    steps: int = 0
    begins: float = 0.0
    group: int = 0

    @property
    def task(self) -> Task:
        """What the client is asked."""
        return self.start, self.steps


@dataclass
class Flights:
    """Clients at work, the models that they started from by number of merges, and the virtual clock."""

    now: float = 0.0
    by_client: dict[str, Flight] = field(default_factory=dict)
    models: dict[int, Tensors] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    """Whose updates the round under way merges."""
    merges: float | None = None
    """When it merges them; None: as soon as the last of them is done."""
    groups: ArrivalGroups = field(default_factory=ArrivalGroups)
    """The clients' speeds and groups, where the server gives them their numbers of local steps."""

    def begin(self, start: int, model: Tensors, arrivals: Mapping[str, float]) -> None:
        """Let clients start from the model after so many merges; whoever isn't there doesn't."""
        there = {client: float(seconds) for client, seconds in arrivals.items() if math.isfinite(seconds)}
        self.by_client |= {client: Flight(start, self.now + seconds) for client, seconds in there.items()}
        if there:
            self.models[start] = model

    def due(self, count: int) -> list[str]:
        """The clients that are done first, so many at most, sorted by name; names decide between equals."""
        order = sorted(self.by_client, key=lambda client: (self.by_client[client].lands, client))
        return sorted(order[:count])

    def by_task(self, clients: Sequence[str]) -> dict[Task, list[str]]:
        """Those clients by what they are asked, in order."""
        tasks = sorted({self.by_client[client].task for client in clients})
        return {task: [client for client in clients if self.by_client[client].task == task] for task in tasks}

    def land(self) -> None:
        """The called are done: the clock goes on to their merge, and models of which nobody is left go."""
        self.now = self._end(self.called)
        for client in self.called:
            del self.by_client[client]
        in_use = {flight.start for flight in self.by_client.values()}
        self.models = {start: model for start, model in self.models.items() if start in in_use}

    def timed(self, call: CohortRequest) -> Participation:
        """All who are called, and how long the step lasts; a second attempt takes no virtual time."""
        end = self._end(call.cohort) if call.attempt == 1 else self.now
        return Participation(call.cohort, end - self.now)

    def _end(self, called: Sequence[str]) -> float:
        """When those clients are merged."""
        ends = [self.by_client[client].lands for client in called] if self.merges is None else [self.merges]
        return max([self.now, *ends])

    def saved(self) -> State:
        """What a checkpoint keeps; nothing where nobody was ever at work."""
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
        """Take back what `saved` said; what is left is others'."""
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
    """A client's flight of a checkpoint; one that is only known to be at work is done at no known time."""
    return Flight(
        start=int(float(state[START + client])),
        lands=float(state.get(LANDS + client, math.inf)),
        steps=int(float(state.get(STEPS + client, 0.0))),
        begins=float(state.get(BEGINS + client, 0.0)),
        group=int(float(state.get(GROUP + client, 0.0))),
    )
