"""Methods whose clients correct their gradients by tensors that they keep from round to round.

They are stored with the prefix `correction/`. A client that never trained, or whose state is lost, has zeros.
A round starts from the state of the client's last round before it, however long ago, and its new state is
stored before the update is sent, so that a repeated round gives the same bits.
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
"""By client, tensors that are added to its gradients in every local step, named and shaped as the model."""
Train = Callable[[Corrections], Iterable[Update]]
"""The round's local training with these corrections: the clients' updates."""
FullGradients = Callable[[], Iterable[Update]]
"""Updates whose deltas are minus each client's full gradient at the request's model."""


class CorrectingClient(Protocol):
    """A method's client part, as pure functions of tensors by name.

    `client_state` is what the client stored in its last round, `sent` what the strategy sent to it.
    """

    @property
    def takes_full_gradients(self) -> bool:
        """Whether the method needs each client's full gradient at the received model."""
        ...

    def correction(self, client_state: Tensors, sent: Tensors) -> Tensors:
        """The tensors that are added to the gradients of every local step."""
        ...

    def after(
        self, update: Update, client_state: Tensors, sent: Tensors, gradient: Tensors
    ) -> tuple[Tensors, Tensors]:
        """(the client's next state, the tensors that its update sends to the strategy)."""
        ...


def correcting_client(job: Job) -> CorrectingClient:
    """The client's part of the job's strategy, for strategies that keep client state.

    It depends on the job alone, whose rules exclude promises of privacy, and not on what a request says.
    """
    options = job.strategy.options or {}
    if job.strategy.name == "feddyn":
        feddyn = validated(FedDynOptions, options, "strategy.options")
        assert isinstance(feddyn, FedDynOptions)
        return FedDynClient(feddyn.alpha)
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
    """The clients' updates; their new states are stored before the updates are returned."""
    client_states = {client: _stored_state(request, client, memory) for client in clients}
    sent = request.strategy_tensors
    gradients: dict[str, Tensors] = {}
    if method.takes_full_gradients:
        gradients = {u.client: {n: -d for n, d in u.delta.items()} for u in full_gradients()}
    updates = train(
        {client: method.correction(client_state, sent) for client, client_state in client_states.items()}
    )

    def finished(some: Iterable[Update]) -> list[Update]:
        states: dict[str, Tensors] = {}
        answered: list[Update] = []
        for update in some:
            client = update.client
            state, answer = method.after(update, client_states[client], sent, gradients.get(client, {}))
            states[client] = prefixed(PREFIX, state)
            answered.append(replace(update, strategy_tensors=answer))
        memory.save(request.run, request.round, states)
        return answered

    if isinstance(updates, StackedUpdates):
        return stacked(finished(updates))
    return (answered for update in updates for answered in finished([update]))


def _stored_state(request: TrainRequest, client: str, memory: ClientStateStore) -> Tensors:
    """The client's stored state, in the model's shapes; zeros where there is none.

    Raises:
        DataError: the state belongs to another model.
    """
    state = memory.load_before(request.run, client, request.round)
    tensors = without_prefix(PREFIX, state)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in request.tensors.items()}
    if state and {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in zeros.items()}:
        raise DataError(f"memory of {client}: is not of this model; the run can't go on from it")
    return tensors or zeros
