"""What clients keep from round to round: a part of the model, or a model beside the shared one.

In a client's memory its own tensors stand under `own/`. A client that never trained has none yet and
uses the first ones, which follow from the job's seed, or the model that all share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

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

OWN_PREFIX = "own/"

Train = Callable[[TrainingRequest, Mapping[str, Tensors]], Iterable[Update]]
"""(request, where clients start that don't start from its tensors): updates, relative to its tensors."""


def model_to_evaluate(
    learner: Learner,
    request: EvaluateRequest,
    client: str,
    memory: ClientStateStore,
    lessons: Callable[[], Shard],
) -> Tensors:
    """The model that this client would use after the request's round, or the one that all share.

    It may have to take a few steps first, on its `training_view`.
    """
    job, steps = learner.job, request.adapt_steps
    if steps:
        return adapt_locally(learner, request, client, lessons(), steps)
    if job.personal.keep is None:
        return request.tensors
    own = {} if request.of_shared_model else _own(request, client, request.round + 1, memory)
    return _whole(learner, request, client, own)


def train_fedper(
    learner: Learner, request: TrainingRequest, shards: Mapping[str, Shard], memory: ClientStateStore
) -> Iterator[Update]:
    """Train whole models; what isn't in the request's tensors stays, and is in memory before the rest goes.

    Arivazhagan et al. 2019 (FedPer): the client's part and the shared one learn together.
    """
    for client, shard in shards.items():
        own = _own(request, client, request.round, memory)
        start = _whole(learner, request, client, own)
        update = train_model(
            learner, start, shard, learner.job, client=client, round=request.round, plan=request.plan
        )
        kept = {
            OWN_PREFIX + n: start[n] + delta for n, delta in update.delta.items() if n not in request.tensors
        }
        memory.save(request.run, request.round, {client: kept})
        yield replace(update, delta={n: d for n, d in update.delta.items() if n in request.tensors})


def train_ditto(
    learner: Learner, request: TrainingRequest, clients: Sequence[str], train: Train, memory: ClientStateStore
) -> Iterable[Update]:
    """The clients' updates of the shared model; each one's own model learns beside, held to what was sent.

    Li et al. 2021, "Ditto", algorithm 1: the own model v moves by the gradient of
    loss(v) + pull / 2 |v - w|^2, with w the shared model as the round began.
    """
    starts = {}
    for client in clients:
        own = _own(request, client, request.round, memory)
        starts[client] = _whole(learner, request, client, own)
    updates = train(request, {})
    beside = train(replace(request, plan={"proximal_mu": learner.job.personal.pull}), starts)
    if not isinstance(updates, StackedUpdates):
        return (_kept(request, *both, memory) for both in zip(updates, beside, strict=True))
    states = {moved.client: _arrived(request, moved) for moved in beside}
    memory.save(request.run, request.round, states)
    return updates


def _kept(request: ModelRequest, update: Update, moved: Update, memory: ClientStateStore) -> Update:
    memory.save(request.run, request.round, {moved.client: _arrived(request, moved)})
    return update


def _arrived(request: ModelRequest, moved: Update) -> Tensors:
    return {OWN_PREFIX + name: request.tensors[name] + delta for name, delta in moved.delta.items()}


def _own(request: ModelRequest, client: str, before: int, memory: ClientStateStore) -> Tensors:
    state = memory.load_before(request.run, client, before)
    return {n.removeprefix(OWN_PREFIX): t for n, t in state.items() if n.startswith(OWN_PREFIX)}


def _whole(learner: Learner, request: ModelRequest, client: str, own: Tensors) -> Tensors:
    """The client's whole model.

    Raises:
        DataError: what it kept is of another model.
    """
    first = learner.client_tensors if learner.job.personal.splits else request.tensors
    if {n: t.shape for n, t in own.items()} not in ({}, {n: t.shape for n, t in first.items()}):
        raise DataError(f"memory of {client}: is not of this model; the run can't go on from it")
    return {**request.tensors, **first, **own}
