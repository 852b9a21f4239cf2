"""Adapts the model to one client by a few local steps, to measure it as the client would use it."""

from __future__ import annotations

import math

import numpy as np

from atoll.client.heads.distillation import head_loss
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.training.local_sgd import train_model
from atoll.client.training.per_fedavg import inner_lr_of
from atoll.client.training.pfedme import MoreauSteps
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.job.train import PLAIN_STEPS
from atoll.learning.learner import Learner
from atoll.protocol.requests import ModelRequest
from atoll.protocol.tensors import Tensors


def _step_of(job: Job) -> dict[str, float | str | None]:
    """Keys of `[train]` that the strategy's own adaptation step replaces: one of plain gradient descent."""
    moreau = MoreauSteps.of(job)
    alpha = inner_lr_of(job) if moreau is None else moreau.inner_lr
    return (
        {**PLAIN_STEPS, "optimizer": "sgd", "lr": alpha, "momentum": 0.0, "weight_decay": 0.0}
        if alpha
        else {}
    )


def adapt_locally(learner: Learner, request: ModelRequest, client: str, shard: Shard, steps: int) -> Tensors:
    """The request's tensors after `steps` local steps on the client's training part.

    With pFedMe the steps lead to the client's personal model theta, which the proximal term holds near them.
    """
    job, moreau = learner.job, MoreauSteps.of(learner.job)
    pull = 0.0 if moreau is None else moreau.pull
    epochs = math.ceil(steps / math.ceil(len(shard) / job.train.batch_size))
    longer = job.model_copy(
        update={"train": job.train.model_copy(update={"epochs": epochs, "steps": None, **_step_of(job)})}
    )
    # In an order of its own, that of the round which would be next.
    round = request.round + 1
    if learner.trains_on_features:
        examples = FeatureTable.of(learner.features.for_training(shard), shard.table, job.train.device)
        local = HeadTrainingConfig(longer, head_loss(job, learner.task.head_loss), round, pull, steps=steps)
        work = ClientRows(client, np.arange(len(shard)))
        update = train_heads(request.tensors, examples, [work], local)[0]
    else:
        update = train_model(
            learner, request.tensors, shard, longer,
            client=client, round=round,
            plan={"proximal_mu": pull}, steps=steps,
        )  # fmt: skip
    moved = {name: request.tensors[name] + delta for name, delta in update.delta.items()}
    return {**request.tensors, **moved}
