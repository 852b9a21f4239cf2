"""Personalization: clients keep a part of the model, or a model beside the shared one.

Their tensors are stored with the prefix `own/`. A client that never trained uses the initial ones, which
follow from the job's seed, or the shared model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from atoll.client.state.fedrep import train_fedrep
from atoll.client.state.ifca import fitting_cluster
from atoll.client.state.store import ClientStateStore
from atoll.client.training.local_adaptation import adapt_locally
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.errors import DataError
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import EvaluateRequest, ModelRequest, TrainingRequest
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors
from atoll.strategies.personal.ifca import model_of_cluster

OWN_PREFIX = "own/"


def model_to_evaluate(
    learner: Learner,
    request: EvaluateRequest,
    client: str,
    memory: ClientStateStore,
    lessons: Callable[[], Shard],
) -> Tensors:
    """The tensors of the model that this client uses after the request's round, or of the shared model.

    With cluster models it is the one with the least loss. Where the request asks for adaptation, local steps
    on the client's training examples, which `lessons` returns, come first.
    """
    job, steps = learner.job, request.adapt_steps
    if job.strategy.makes_clusters:
        return model_of_cluster(request.tensors, fitting_cluster(learner, request.tensors, lessons()))
    if steps:
        return adapt_locally(learner, request, client, lessons(), steps)
    if job.personal.keep is None:
        return request.tensors
    client_tensors = (
        {} if request.of_shared_model else own_tensors(request, client, request.round + 1, memory)
    )
    whole = whole_model(learner, request, client, client_tensors)
    alpha = job.personal.mixing_weight
    return mixture(whole, request.tensors, alpha) if alpha and client_tensors else whole


def train_fedper(
    learner: Learner, request: TrainingRequest, shards: Mapping[str, Shard], memory: ClientStateStore
) -> Iterator[Update]:
    """The updates of the shared tensors; each client's other tensors are trained too, and stored before.

    Arivazhagan et al. 2019 (FedPer): both parts are trained together or, with `personal.head_epochs`, one
    after the other (FedRep).
    """
    for client, shard in shards.items():
        client_tensors = own_tensors(request, client, request.round, memory)
        start = whole_model(learner, request, client, client_tensors)
        update = (
            train_model(
                learner, start, shard, learner.job, client=client, round=request.round, plan=request.plan
            )
            if learner.job.personal.head_epochs is None
            else train_fedrep(learner, request, start, client, shard)
        )
        kept_tensors = {
            OWN_PREFIX + n: start[n] + delta for n, delta in update.delta.items() if n not in request.tensors
        }
        memory.save(request.run, request.round, {client: kept_tensors})
        yield replace(update, delta={n: d for n, d in update.delta.items() if n in request.tensors})


def mixture(personal: Tensors, shared: Tensors, alpha: float) -> Tensors:
    """The model alpha v + (1 - alpha) w that a client of APFL uses (`apfl.py`)."""
    return {name: alpha * v + (1 - alpha) * shared[name] for name, v in personal.items()}


def own_starts(
    learner: Learner, request: ModelRequest, clients: Iterable[str], memory: ClientStateStore
) -> dict[str, Tensors]:
    """Each client's personal model at the start of the round, by client."""
    by_client = {client: own_tensors(request, client, request.round, memory) for client in clients}
    return {client: whole_model(learner, request, client, tensors) for client, tensors in by_client.items()}


def keep_own(request: ModelRequest, moves: Iterable[Update], memory: ClientStateStore) -> None:
    """Store the personal models after the updates: of stacked updates together, of others one by one."""
    if isinstance(moves, StackedUpdates):
        memory.save(request.run, request.round, {moved.client: _arrived(request, moved) for moved in moves})
        return
    for moved in moves:
        memory.save(request.run, request.round, {moved.client: _arrived(request, moved)})


def _arrived(request: ModelRequest, moved: Update) -> Tensors:
    return {OWN_PREFIX + name: request.tensors[name] + delta for name, delta in moved.delta.items()}


def own_tensors(request: ModelRequest, client: str, before: int, memory: ClientStateStore) -> Tensors:
    """The tensors that the client stored in its newest round before `before`; empty if it never trained."""
    state = memory.load_before(request.run, client, before)
    return {n.removeprefix(OWN_PREFIX): t for n, t in state.items() if n.startswith(OWN_PREFIX)}


def whole_model(learner: Learner, request: ModelRequest, client: str, client_tensors: Tensors) -> Tensors:
    """The client's whole model: the request's tensors, with the client's own in place of the initial ones.

    Raises:
        DataError: the stored tensors belong to another model.
    """
    first = learner.client_tensors if learner.job.personal.splits else request.tensors
    if {n: t.shape for n, t in client_tensors.items()} not in ({}, {n: t.shape for n, t in first.items()}):
        raise DataError(f"memory of {client}: is not of this model; the run can't go on from it")
    return {**request.tensors, **first, **client_tensors}
