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
from atoll.server.rounds.participation import CohortRequest, Participation
from atoll.strategies.strategy import State

NOW, START, LANDS, MODEL = "flights.now", "flights.start.", "flights.lands.", "flights.model."
"""Names in a checkpoint: the clock; by client its start and its end; by number of merges the models."""


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
class Flight:
    """One client at work: after how many merges it started, and when it is done."""

    start: int
    lands: float


@dataclass
class Flights:
    """Clients at work, the models that they started from by number of merges, and the virtual clock."""

    now: float = 0.0
    by_client: dict[str, Flight] = field(default_factory=dict)
    models: dict[int, Tensors] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    """Whose updates the round under way merges."""

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

    def by_start(self, clients: Sequence[str]) -> dict[int, list[str]]:
        """Those clients by the number of merges before they started, in order."""
        starts = sorted({self.by_client[client].start for client in clients})
        return {
            start: [client for client in clients if self.by_client[client].start == start] for start in starts
        }

    def land(self) -> None:
        """The called are done: the clock is at the last of them, and models of which nobody is left go."""
        ends = [self.by_client.pop(client).lands for client in self.called]
        self.now = max([self.now, *ends])
        in_use = {flight.start for flight in self.by_client.values()}
        self.models = {start: model for start, model in self.models.items() if start in in_use}

    def timed(self, call: CohortRequest) -> Participation:
        """All who are called, and how long the step lasts; a second attempt takes no virtual time."""
        ends = [self.by_client[client].lands for client in call.cohort] if call.attempt == 1 else []
        return Participation(call.cohort, max([self.now, *ends]) - self.now)

    def saved(self) -> State:
        """What a checkpoint keeps; nothing where nobody was ever at work."""
        if not self.by_client and not self.now:
            return {}
        state: State = {NOW: self.now}
        for client, flight in self.by_client.items():
            state |= {START + client: float(flight.start), LANDS + client: flight.lands}
        for start, model in self.models.items():
            state |= {f"{MODEL}{start}.{name}": tensor for name, tensor in model.items()}
        return state

    def resume(self, state: State) -> State:
        """Take back what `saved` said; what is left is others'."""
        self.now = float(state.get(NOW, 0.0))
        starts = {n.removeprefix(START): int(float(v)) for n, v in state.items() if n.startswith(START)}
        self.by_client = {c: Flight(start, float(state[LANDS + c])) for c, start in starts.items()}
        self.models = {}
        for name, tensor in state.items():
            if name.startswith(MODEL):
                start, _, of = name.removeprefix(MODEL).partition(".")
                self.models.setdefault(int(start), {})[of] = cast(torch.Tensor, tensor)
        return {n: v for n, v in state.items() if not n.startswith((NOW, START, LANDS, MODEL))}
