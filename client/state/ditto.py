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

from atoll.client.state.personalization import keep_own, own_starts
from atoll.client.state.store import ClientStateStore
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import TrainingRequest
from atoll.protocol.tensors import Tensors

Train = Callable[[TrainingRequest, Mapping[str, Tensors], Job], Iterable[Update]]
"""(request, where each client starts, how): updates, relative to the request's tensors; none is noised."""


def train_ditto(
    learner: Learner, request: TrainingRequest, clients: Sequence[str], train: Train, memory: ClientStateStore
) -> None:
    """Train each client's own model v_k, which is in its memory after."""
    starts = own_starts(learner, request, clients, memory)
    held = replace(request, plan={"proximal_mu": learner.job.personal.pull})
    keep_own(request, train(held, starts, own_training(learner.job)), memory)


def own_training(job: Job) -> Job:
    """The job with the local epochs of v_k."""
    if job.personal.epochs is None:
        return job
    own = {"epochs": job.personal.epochs, "steps": None}
    return job.model_copy(update={"train": job.train.model_copy(update=own)})
