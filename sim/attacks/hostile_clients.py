"""Which simulated clients are hostile, and the transport on which their updates become what they send."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from atoll.job.attack import POISONS_LABELS, SENDS_WHAT_IT_LEARNS, AttackSection
from atoll.job.job import Job
from atoll.kit.roster import FederationRoster
from atoll.privacy.secagg_encoding import flat, unflatten
from atoll.protocol.messages import Reply, Update
from atoll.protocol.random_streams import stream
from atoll.protocol.requests import Request, TrainRequest
from atoll.server.roster import ClientRoster
from atoll.server.transport import Transport
from atoll.sim.attacks.hostile_updates import alie, gaussian, inner_product, min_max, sign_flip
from atoll.strategies.options import trusted_client


def hostile_names(job: Job, names: Sequence[str]) -> list[str]:
    """The clients of the job that are hostile, in their order; which ones, the job's seed decides.

    One that the strategy trusts is none of them.
    """
    if job.attack.kind is None:
        return []

    def mark(name: str) -> bytes:
        return hashlib.sha256(f"{job.seed}/attack/{name}".encode()).digest()

    open_to_all = [name for name in names if name != trusted_client(job)]
    return sorted(sorted(open_to_all, key=mark)[: job.attack.clients])


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
        honest = [flat(update.delta) for update in updates if update.client not in self.hostile]
        agreed = self._agreed(honest or [flat(update.delta) for update in updates])
        for reply in replies:
            if isinstance(reply, Update) and reply.client in self.hostile:
                sent = self._delta_of(reply) if agreed is None else agreed
                delta = unflatten(sent, reply.delta)
                reply = replace(
                    reply, delta={name: tensor.to(reply.delta[name]) for name, tensor in delta.items()}
                )
            yield reply

    def _agreed(self, rows: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The row that all hostile clients send alike, of the honest ones; None where each sends its own."""
        attack = self.job.attack
        if not rows or attack.kind not in ("inner-product", "alie", "min-max", "mimic"):
            return None
        honest = torch.stack([*rows])
        match attack.kind:
            case "inner-product":
                return inner_product(honest, attack.factor)
            case "alie":
                return alie(honest, attack.factor)
            case "min-max":
                return min_max(honest)
        return honest[0]  # mimic: the same honest client, whose data then weighs too much

    def _delta_of(self, update: Update) -> torch.Tensor:
        attack, honest = self.job.attack, flat(update.delta)
        match attack.kind:
            case "sign-flip":
                return sign_flip(honest, attack.factor)
            case "gaussian":
                return gaussian(
                    honest, attack.factor, stream(self.job.seed, "attack", update.round, update.client)
                )
            case "free-rider":
                return torch.zeros_like(honest)
        return attack.factor * honest  # a backdoor, boosted


def attacked(transport: Transport, job: Job, names: Sequence[str]) -> Transport:
    """The transport with the job's hostile clients on it; itself where none changes its update."""
    if job.attack.kind in (None, SENDS_WHAT_IT_LEARNS):
        return transport
    hostile = frozenset(hostile_names(job, names))
    return AttackedTransport(
        transport, job, hostile, transport.engine, transport.uses_masking, transport.roster
    )


def described(attack: AttackSection, hostile: Sequence[str], clients: int) -> str:
    """What a run's first lines say of its hostile clients."""
    scale = f", scale {attack.factor:g}" if attack.factor != 1 else ""
    names = ", ".join(hostile[:5]) + (", …" if len(hostile) > 5 else "")
    labels_note = "; what they measure is measured on changed labels" if attack.kind in POISONS_LABELS else ""
    return f"{len(hostile)} of {clients} clients are hostile ({attack.kind}{scale}): {names}{labels_note}"
