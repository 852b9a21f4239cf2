"""Canary clients: each one's update is a direction of its own, and longer than the clipping norm.

They are the worst that a client's promise has to stand: what is left of an update has the whole clipping
norm (more, if nobody clips), and no two point the same way. The directions are rows of an orthonormal
cosine transform behind random signs, so that a single transform of a released sum gives every canary's
part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct, idct

from atoll.job.job import Job
from atoll.kit.roster import FederationRoster
from atoll.privacy.auditing.epsilon_bounds import Membership, Vector
from atoll.privacy.dp_plan import DpPlan
from atoll.privacy.noise import entropy
from atoll.privacy.secagg_encoding import FixedPointCodec, clipped, flat, length, unflatten
from atoll.protocol.messages import Reply, SecureMessage, Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.requests import Request, UnmaskedSumRequest
from atoll.protocol.stacked_updates import StackedUpdates, joined, stacked
from atoll.protocol.tensors import Tensors
from atoll.server.roster import ClientRoster
from atoll.server.rounds.run_state import Run
from atoll.server.transport import Transport
from atoll.sim.audit.replay import NoLedgers, RoundTranscript, clipping_norm_of
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.simulated_site import SimulatedSite
from atoll.sim.population.population import Population

MAX_NUMBERS = 1 << 27
"""Numbers of all canaries' updates together: half of them are in memory at a time."""
CANARY_NORM_FACTOR = 4.0
"""Times the clipping norm: how long a canary's update is before it is clipped."""
NUMBERS_PER_BLOCK = 1 << 22
"""Numbers of the directions that are made at a time."""


@dataclass(frozen=True)
class CanaryClients:
    """So many clients with no data, in a run of a job that makes clients a promise."""

    population: Population
    job: Job
    dp_plan: DpPlan
    model: Tensors
    count: int

    @classmethod
    def most(cls, model: Tensors) -> int:
        """How many there can be for a model: as many as directions, or as fit into memory."""
        numbers = sum(t.numel() for t in model.values())
        return min(numbers, MAX_NUMBERS // numbers)

    @property
    def what(self) -> str:
        return "canary clients, each with an update in a direction of its own"

    def names(self, inside: Membership) -> list[str]:
        return [_name(place) for place in np.flatnonzero(inside).tolist()]

    def carrier(self, inside: Membership) -> Transport:
        site = SimulatedSite(self.population, ledgers=NoLedgers(Path()), population=self.population)
        plain = InlineTransport(self.population, site)
        if self.dp_plan.where == "server":
            return plain
        return JoinedSums(plain, self, np.flatnonzero(inside))

    def joined(self, run: Run, updates: Sequence[Update], present: Sequence[str]) -> Sequence[Update]:
        """Where the server sees updates, theirs stand among them; else they are in the sum already."""
        if self.dp_plan.where != "server" or not present:
            return updates
        norm = clipping_norm_of(run)
        places = [_place(name) for name in present]
        real = stacked(updates) if len(updates) else None
        states = {} if real is None else real.states
        canaries = StackedUpdates(
            clients=tuple(present),
            round=run.state.round + 1,
            delta=self._deltas(places, CANARY_NORM_FACTOR * norm),
            num_examples=(1,) * len(present),
            states={name: torch.zeros(len(present), dtype=t.dtype) for name, t in states.items()},
        )
        return canaries if real is None else joined([real, canaries])

    @property
    def scores_are_sums(self) -> bool:
        return True

    def scores(self, seen: RoundTranscript, inside: Membership) -> Vector:
        """How far the released mean goes in each canary's direction, in clipping norms.

        The noise's deviation is in proportion to the norm, also where that adapts, so that in this unit
        every round says as much: the sum over rounds is the matched filter.
        """
        scores = np.zeros(self.count)
        for update in seen.released:
            parts: Vector = dct(flat(update.delta).numpy() * self._signs, norm="ortho")[self._rows]
            scores += parts / seen.clipping_norm
        return scores

    def integers(self, places: NDArray[np.int64], request: UnmaskedSumRequest) -> NDArray[np.uint64]:
        """The canaries' contributions to a secure sum, clipped and rounded as a client's, without noise."""
        numbers = length(request.tensors, private=True)
        shares = FixedPointCodec.of(self.dp_plan, numbers, request.threshold, entropy)
        silent, norm = FixedPointCodec(shares.granularity, None), self.dp_plan.promise.clipping_norm
        total = np.zeros(numbers, dtype=np.uint64)
        for rows in self._directions(places):
            for row in rows:
                total += silent.integers(
                    clipped(torch.from_numpy(row * CANARY_NORM_FACTOR * norm), norm).numpy()
                )
        return total

    @cached_property
    def _numbers(self) -> int:
        return sum(t.numel() for t in self.model.values())

    @cached_property
    def _signs(self) -> Vector:
        generator = np.random.default_rng(stream_seed(self.job.seed, "audit", "signs"))
        return np.asarray(generator.integers(0, 2, self._numbers) * 2.0 - 1)

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        generator = np.random.default_rng(stream_seed(self.job.seed, "audit", "rows"))
        return generator.permutation(self._numbers)[: self.count]

    def _directions(self, places: Sequence[int] | NDArray[np.int64]) -> Iterator[Vector]:
        """Unit vectors of those canaries, [some, numbers] at a time."""
        chosen = self._rows[np.asarray(places, dtype=np.int64)]
        some = max(1, NUMBERS_PER_BLOCK // self._numbers)
        for start in range(0, len(chosen), some):
            part = chosen[start : start + some]
            spectrum = np.zeros((len(part), self._numbers))
            spectrum[np.arange(len(part)), part] = 1
            yield idct(spectrum, norm="ortho", axis=1) * self._signs

    def _deltas(self, places: Sequence[int], norm: float) -> Tensors:
        """Updates of that norm in one stack, in the model's own precision."""
        parts = [torch.from_numpy(rows * norm).to(torch.float32) for rows in self._directions(places)]
        whole = torch.cat(parts)
        apart = [unflatten(row, self.model) for row in whole]
        return {name: torch.stack([a[name] for a in apart]).to(t.dtype) for name, t in self.model.items()}


@dataclass
class JoinedSums:
    """A carrier of secure sums, one of whose vectors has the canaries' contributions on top.

    The sum is what it would be had they sent vectors of their own, but for their shares of the noise:
    it holds no more noise than the cohort adds.
    """

    plain: InlineTransport
    canaries: CanaryClients
    places: NDArray[np.int64]
    engine: str = "inline"
    uses_masking: bool = False
    roster: FederationRoster | None = None

    def discover_clients(self, job: Job) -> ClientRoster:
        return self.plain.discover_clients(job)

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Reply]:
        is_first = True
        for reply in self.plain.send_and_receive(request, names, timeout):
            if is_first and isinstance(reply, SecureMessage) and isinstance(request, UnmaskedSumRequest):
                vector = reply.content["vector"].numpy().view(np.uint64)
                both = (vector + self.canaries.integers(self.places, request)).view(np.int64)
                reply = SecureMessage(
                    reply.client, reply.round, {**reply.content, "vector": torch.from_numpy(both)}
                )
                is_first = False
            yield reply


def _name(place: int) -> str:
    return f"canary-{place:06d}"


def _place(name: str) -> int:
    return int(name.removeprefix("canary-"))
