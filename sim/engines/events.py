"""The steps that only a simulated run has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.server.events import Event

if TYPE_CHECKING:
    from atoll.sim.population.population import Population


@dataclass(frozen=True)
class PopulationRead(Event):
    """The data is read and dealt to the clients."""

    population: Population


@dataclass(frozen=True)
class ExecutionChosen(Event):
    """How clients train on this machine, in a few words."""

    mode: str


@dataclass(frozen=True)
class AuditAdvanced(Event):
    """So many of all the rounds that an audit plays again are over."""

    done: int
    total: int
