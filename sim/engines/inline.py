"""The in-process engine: clients in this process, or in worker processes, no serialisation at one worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.site import Site
from atoll.client.state.store import ClientStateStore
from atoll.job.job import Job
from atoll.kit.roster import FederationRoster
from atoll.learning.learner import Learner
from atoll.protocol.messages import Reply
from atoll.protocol.requests import Request
from atoll.server.roster import ClientRoster
from atoll.sim.engines.simulated_site import SimulatedSite
from atoll.sim.population.population import Population


@dataclass
class InlineTransport:
    """A transport that calls the clients' code in this process: breakpoints work, and nothing is copied."""

    population: Population
    site: SimulatedSite
    engine: str = "inline"
    uses_masking: bool = False
    roster: FederationRoster | None = None

    @classmethod
    def of(
        cls,
        population: Population,
        workers: int = 1,
        *,
        at_once: bool = False,
        ledgers: PrivacyLedgers | None = None,
        memory: ClientStateStore | None = None,
    ) -> Self:
        """A transport to all clients of the population; heads are trained in `workers` threads."""
        site = SimulatedSite(
            population, ledgers=ledgers, memory=memory or ClientStateStore(), population=population,
            workers=workers, at_once=at_once,
        )  # fmt: skip
        return cls(population, site, "cohort" if at_once else "inline")

    def share(self, learner: Learner) -> None:
        self.site.adopt(learner)

    def discover_clients(self, job: Job) -> ClientRoster:
        return self.population.roster(job)

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Reply]:
        return self.site.answer(request, names)


@dataclass
class LoopTransport:
    """A transport that trains one client after the other, each from its own shard, as real clients do."""

    population: Population
    site: Site
    engine: str = "loop"
    uses_masking: bool = False
    roster: FederationRoster | None = None

    @classmethod
    def of(
        cls,
        population: Population,
        ledgers: PrivacyLedgers | None = None,
        memory: ClientStateStore | None = None,
    ) -> Self:
        """A transport to all clients of the population."""
        return cls(population, Site(population, ledgers=ledgers, memory=memory or ClientStateStore()))

    def discover_clients(self, job: Job) -> ClientRoster:
        return self.population.roster(job)

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Reply]:
        return (reply for name in names for reply in self.site.answer(request, [name]))
