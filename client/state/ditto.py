"""Ditto (Li et al. 2021, "Fair and Robust Federated Learning Through Personalization", algorithm 1).

w is the shared model at the start of the round, F_k client k's loss and v_k its personal model, which starts
as w. Beside the round, which may be any strategy's, v_k takes local steps to minimise

    F_k(v_k) + lambda / 2 ||v_k - w||^2

from its value after its last round, however long ago: v_k <- v_k - eta (grad F_k(v_k) + lambda (v_k - w)).
lambda is `personal.pull`; the steps are those of `personal.epochs` epochs, or as many as w's.
v_k never leaves the client, and no update depends on it. Promises of privacy therefore hold for what leaves,
and v_k is trained without noise.
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
"""(request, tensors from which each client starts, job) to updates relative to the request, without noise."""


def train_ditto(
    learner: Learner, request: TrainingRequest, clients: Sequence[str], train: Train, memory: ClientStateStore
) -> None:
    """Train each client's personal model v_k, and store it."""
    starts = own_starts(learner, request, clients, memory)
    held = replace(request, plan={"proximal_mu": learner.job.personal.pull})
    keep_own(request, train(held, starts, own_training(learner.job)), memory)


def own_training(job: Job) -> Job:
    """The job with `personal.epochs` as its local epochs, if they are given."""
    if job.personal.epochs is None:
        return job
    epochs = {"epochs": job.personal.epochs, "steps": None}
    return job.model_copy(update={"train": job.train.model_copy(update=epochs)})
