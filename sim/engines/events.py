"""The events that only simulated runs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.server.events import Event

if TYPE_CHECKING:
    from atoll.sim.population.population import Population


@dataclass(frozen=True)
class PopulationRead(Event):
    """The data is read and assigned to the clients."""

    population: Population


@dataclass(frozen=True)
class ExecutionChosen(Event):
    """It is decided how clients train on this machine; the event has a short description."""

    mode: str


@dataclass(frozen=True)
class AuditAdvanced(Event):
    """An audit, which replays rounds, has finished one more of them."""

    done: int
    total: int
