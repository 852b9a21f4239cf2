"""Ditto (Li et al. 2021, "Fair and Robust Federated Learning Through Personalization", algorithm 1).

w is the model that all share, as the round began, F_k client k's loss and v_k a model of its own, first w.
Beside the round, which is any strategy's, v_k takes local steps down the gradient of

    F_k(v_k) + lambda / 2 ||v_k - w||^2

from where its last round left it, however long ago: v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w)).
lambda is `personal.pull`; the steps are those of `personal.epochs` epochs, or as many as w's.
v_k never leaves, and no update depends on it: so promises of privacy hold for what leaves, and v_k itself
reads the examples without noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from atoll.client.state.personalization import OWN_PREFIX, own_tensors, whole_model
from atoll.client.state.store import ClientStateStore
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import ModelRequest, TrainingRequest
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors

Train = Callable[[TrainingRequest, Mapping[str, Tensors], Job], Iterable[Update]]
"""(request, where each client starts, how): updates, relative to the request's tensors; none is noised."""


def train_ditto(
    learner: Learner, request: TrainingRequest, clients: Sequence[str], train: Train, memory: ClientStateStore
) -> None:
    """Train each client's own model v_k, which is in its memory after."""
    starts = {}
    for client in clients:
        own = own_tensors(request, client, request.round, memory)
        starts[client] = whole_model(learner, request, client, own)
    held = replace(request, plan={"proximal_mu": learner.job.personal.pull})
    moves = train(held, starts, own_training(learner.job))
    if isinstance(moves, StackedUpdates):
        memory.save(request.run, request.round, {moved.client: _arrived(request, moved) for moved in moves})
        return
    for moved in moves:
        memory.save(request.run, request.round, {moved.client: _arrived(request, moved)})


def own_training(job: Job) -> Job:
    """The job with the local epochs of v_k."""
    if job.personal.epochs is None:
        return job
    return job.model_copy(update={"train": job.train.model_copy(update={"epochs": job.personal.epochs})})


def _arrived(request: ModelRequest, moved: Update) -> Tensors:
    return {OWN_PREFIX + name: request.tensors[name] + delta for name, delta in moved.delta.items()}
