"""Which simulated clients are hostile, and the transport on which their updates become what they send."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from atoll.job.attack import POISONS_LABELS, AttackSection
from atoll.job.job import Job
from atoll.kit.roster import FederationRoster
from atoll.protocol.messages import Reply, Update
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import Request, TrainRequest
from atoll.protocol.tensors import Tensors
from atoll.server.roster import ClientRoster
from atoll.server.transport import Transport
from atoll.sim.attacks.hostile_updates import alie, gaussian, inner_product, min_max, sign_flip


def hostile_names(job: Job, names: Sequence[str]) -> list[str]:
    """The clients of the job that are hostile, in their order; which ones, the job's seed decides."""
    if job.attack.kind is None:
        return []

    def mark(name: str) -> bytes:
        return hashlib.sha256(f"{job.seed}/attack/{name}".encode()).digest()

    return sorted(sorted(names, key=mark)[: job.attack.clients])


@dataclass
class AttackedTransport:
    """A transport to clients of whom some are hostile: in rounds of training they replace their deltas.

    They know what all clients of the round were about to send. Each round's replies are held until all are
    there.
    """

    inner: Transport
    job: Job
    hostile: frozenset[str]
    engine: str
    uses_masking: bool
    roster: FederationRoster | None

    def discover_clients(self, job: Job) -> ClientRoster:
        return self.inner.discover_clients(job)

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Reply]:
        replies = self.inner.send_and_receive(request, names, timeout)
        return self._attacked(list(replies)) if isinstance(request, TrainRequest) else replies

    def _attacked(self, replies: list[Reply]) -> Iterable[Reply]:
        updates = sorted(
            (reply for reply in replies if isinstance(reply, Update)), key=lambda update: update.client
        )
        honest = [row_of(update.delta) for update in updates if update.client not in self.hostile]
        seen = torch.stack(honest or [row_of(update.delta) for update in updates]) if updates else None
        for reply in replies:
            if isinstance(reply, Update) and reply.client in self.hostile and seen is not None:
                sent = self._row(row_of(reply.delta), seen, reply)
                reply = replace(reply, delta=delta_of(sent, reply.delta))
            yield reply

    def _row(self, own: torch.Tensor, honest: torch.Tensor, update: Update) -> torch.Tensor:
        attack = self.job.attack
        match attack.kind:
            case "sign-flip":
                return sign_flip(own, attack.factor)
            case "inner-product":
                return inner_product(honest, attack.factor)
            case "alie":
                return alie(honest, attack.factor)
            case "min-max":
                return min_max(honest)
            case "mimic":  # all of them the same honest client, whose data then weighs too much
                return honest[0]
            case "gaussian":
                return gaussian(
                    own, attack.factor, stream(self.job.seed, "attack", update.round, update.client)
                )
            case "free-rider":
                return torch.zeros_like(own)
        return attack.factor * own  # what was learnt from poisoned labels, boosted


def attacked(transport: Transport, job: Job, names: Sequence[str]) -> Transport:
    """The transport with the job's hostile clients on it; itself where none is."""
    if job.attack.kind is None:
        return transport
    hostile = frozenset(hostile_names(job, names))
    return AttackedTransport(
        transport, job, hostile, transport.engine, transport.uses_masking, transport.roster
    )


def described(attack: AttackSection, hostile: Sequence[str], clients: int) -> str:
    """What a run's first lines say of its hostile clients."""
    scale = f", scale {attack.factor:g}" if attack.factor != 1 else ""
    told = ", ".join(hostile[:5]) + (", …" if len(hostile) > 5 else "")
    own = "; what they measure is measured on changed labels" if attack.kind in POISONS_LABELS else ""
    return f"{len(hostile)} of {clients} clients are hostile ({attack.kind}{scale}): {told}{own}"


def row_of(delta: Tensors) -> torch.Tensor:
    """A delta as one row of numbers in float64, in the order of the tensors' names."""
    return torch.cat([delta[name].reshape(-1).to(torch.float64) for name in sorted(delta)])


def delta_of(row: torch.Tensor, like: Tensors) -> Tensors:
    """The row as tensors of the names, shapes and dtypes of `like`."""
    names = sorted(like)
    parts = torch.split(row, [like[name].numel() for name in names])
    return {
        name: part.reshape(like[name].shape).to(like[name]) for name, part in zip(names, parts, strict=True)
    }
