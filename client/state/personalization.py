"""What clients keep from round to round: a part of the model, or a model beside the shared one.

In a client's memory its own tensors stand under `own/`. A client that never trained has none yet and
uses the first ones, which follow from the job's seed, or the model that all share.
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
    """The model that this client would use after the request's round, or the one that all share.

    Of a model for each cluster it is the one that fits. It may have to take a few steps first, on its
    `training_view`.
    """
    job, steps = learner.job, request.adapt_steps
    if job.strategy.makes_clusters:
        return model_of_cluster(request.tensors, fitting_cluster(learner, request.tensors, lessons()))
    if steps:
        return adapt_locally(learner, request, client, lessons(), steps)
    if job.personal.keep is None:
        return request.tensors
    own = {} if request.of_shared_model else own_tensors(request, client, request.round + 1, memory)
    whole = whole_model(learner, request, client, own)
    alpha = job.personal.mixing_weight
    return mixture(whole, request.tensors, alpha) if alpha and own else whole


def train_fedper(
    learner: Learner, request: TrainingRequest, shards: Mapping[str, Shard], memory: ClientStateStore
) -> Iterator[Update]:
    """Train whole models; what isn't in the request's tensors stays, and is in memory before the rest goes.

    Arivazhagan et al. 2019 (FedPer): the client's part and the shared one learn together, or with
    `personal.head_epochs` one after the other.
    """
    for client, shard in shards.items():
        own = own_tensors(request, client, request.round, memory)
        start = whole_model(learner, request, client, own)
        update = (
            train_model(
                learner, start, shard, learner.job, client=client, round=request.round, plan=request.plan
            )
            if learner.job.personal.head_epochs is None
            else train_fedrep(learner, request, start, client, shard)
        )
        kept = {
            OWN_PREFIX + n: start[n] + delta for n, delta in update.delta.items() if n not in request.tensors
        }
        memory.save(request.run, request.round, {client: kept})
        yield replace(update, delta={n: d for n, d in update.delta.items() if n in request.tensors})


def mixture(own: Tensors, shared: Tensors, alpha: float) -> Tensors:
    """alpha v + (1 - alpha) w, which a client of APFL uses (`apfl.py`)."""
    return {name: alpha * v + (1 - alpha) * shared[name] for name, v in own.items()}


def own_starts(
    learner: Learner, request: ModelRequest, clients: Iterable[str], memory: ClientStateStore
) -> dict[str, Tensors]:
    """Where each client's own model is as the round begins."""
    own = {client: own_tensors(request, client, request.round, memory) for client in clients}
    return {client: whole_model(learner, request, client, tensors) for client, tensors in own.items()}


def keep_own(request: ModelRequest, moves: Iterable[Update], memory: ClientStateStore) -> None:
    """Put where own models arrived in their clients' memory: a cohort's at once, others one by one."""
    if isinstance(moves, StackedUpdates):
        memory.save(request.run, request.round, {moved.client: _arrived(request, moved) for moved in moves})
        return
    for moved in moves:
        memory.save(request.run, request.round, {moved.client: _arrived(request, moved)})


def _arrived(request: ModelRequest, moved: Update) -> Tensors:
    return {OWN_PREFIX + name: request.tensors[name] + delta for name, delta in moved.delta.items()}


def own_tensors(request: ModelRequest, client: str, before: int, memory: ClientStateStore) -> Tensors:
    """What the client has kept of the newest round before that one, by name; nothing if it never trained."""
    state = memory.load_before(request.run, client, before)
    return {n.removeprefix(OWN_PREFIX): t for n, t in state.items() if n.startswith(OWN_PREFIX)}


def whole_model(learner: Learner, request: ModelRequest, client: str, own: Tensors) -> Tensors:
    """The client's whole model.

    Raises:
        DataError: what it kept is of another model.
    """
    first = learner.client_tensors if learner.job.personal.splits else request.tensors
    if {n: t.shape for n, t in own.items()} not in ({}, {n: t.shape for n, t in first.items()}):
        raise DataError(f"memory of {client}: is not of this model; the run can't go on from it")
    return {**request.tensors, **first, **own}
