"""Methods whose clients correct their gradients by tensors that they keep from round to round.

In a client's memory these stand under `correction/`. A client that never trained, or whose memory is gone,
has zeros. Training in a round begins with what the client's last round before it left, however long ago that
was, and what it leaves is in memory before the update goes: a round that is tried again gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import torch

from atoll.client.state.feddyn import FedDynClient
from atoll.client.state.scaffold import ScaffoldClient
from atoll.client.state.store import ClientStateStore
from atoll.errors import DataError
from atoll.job.extension_options import validated
from atoll.job.job import Job
from atoll.protocol.fields import prefixed, without_prefix
from atoll.protocol.messages import Update
from atoll.protocol.requests import TrainRequest
from atoll.protocol.stacked_updates import StackedUpdates, stacked
from atoll.protocol.tensors import Tensors
from atoll.strategies.options import FedDynOptions, ScaffoldOptions

PREFIX = "correction"

Corrections = Mapping[str, Tensors]
"""By client: what is added to its gradients in every local step, named and shaped as the model."""
Train = Callable[[Corrections], Iterable[Update]]
"""The round's local training with corrected gradients."""
FullGradients = Callable[[], Iterable[Update]]
"""Updates that moved by minus the gradient of each client's whole loss at the request's model."""


class CorrectingClient(Protocol):
    """What a method does at a client, as pure functions of named tensors; `sent` is from the strategy."""

    @property
    def takes_full_gradients(self) -> bool:
        """Whether each client's gradient at the model it received is needed as well."""
        ...

    def correction(self, own: Tensors, sent: Tensors) -> Tensors:
        """What is added to the gradients of every local step."""
        ...

    def after(
        self, update: Update, own: Tensors, sent: Tensors, gradient: Tensors
    ) -> tuple[Tensors, Tensors]:
        """(what the client keeps now, what its update answers the strategy)."""
        ...


def correcting_client(job: Job) -> CorrectingClient:
    """The client's part of the job's strategy, which `keeps_client_state`.

    It follows from the job, whose rules exclude promises of privacy, and from nothing that a request says.
    """
    options = job.strategy.options or {}
    if job.strategy.name == "feddyn":
        own = validated(FedDynOptions, options, "strategy.options")
        assert isinstance(own, FedDynOptions)
        return FedDynClient(own.alpha)
    chosen = validated(ScaffoldOptions, options, "strategy.options")
    assert isinstance(chosen, ScaffoldOptions)
    return ScaffoldClient(job.train, chosen.option, job.federation.rounds)


def train_corrected(
    method: CorrectingClient,
    request: TrainRequest,
    clients: Iterable[str],
    train: Train,
    full_gradients: FullGradients,
    memory: ClientStateStore,
) -> Iterable[Update]:
    """The clients' updates; what they keep is in their memory before these leave."""
    own = {client: _own(request, client, memory) for client in clients}
    sent = request.strategy_tensors
    gradients: dict[str, Tensors] = {}
    if method.takes_full_gradients:
        gradients = {u.client: {n: -d for n, d in u.delta.items()} for u in full_gradients()}
    updates = train({client: method.correction(kept, sent) for client, kept in own.items()})

    def finished(some: Iterable[Update]) -> list[Update]:
        states: dict[str, Tensors] = {}
        answered: list[Update] = []
        for update in some:
            client = update.client
            kept, answer = method.after(update, own[client], sent, gradients.get(client, {}))
            states[client] = prefixed(PREFIX, kept)
            answered.append(replace(update, strategy_tensors=answer))
        memory.save(request.run, request.round, states)
        return answered

    if isinstance(updates, StackedUpdates):
        return stacked(finished(updates))
    return (answered for update in updates for answered in finished([update]))


def _own(request: TrainRequest, client: str, memory: ClientStateStore) -> Tensors:
    """What the client has kept, in the model's shapes.

    Raises:
        DataError: it is of another model.
    """
    state = memory.load_before(request.run, client, request.round)
    own = without_prefix(PREFIX, state)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in request.tensors.items()}
    if state and {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in zeros.items()}:
        raise DataError(f"memory of {client}: is not of this model; the run can't go on from it")
    return own or zeros
