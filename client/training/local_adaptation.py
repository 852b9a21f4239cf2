"""A model that a client adapts for itself by a few local steps, as it would after a run."""

from __future__ import annotations

import math

import numpy as np

from atoll.client.heads.distillation import head_loss
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.learning.learner import Learner
from atoll.protocol.requests import ModelRequest
from atoll.protocol.tensors import Tensors


def adapt_locally(learner: Learner, request: ModelRequest, client: str, shard: Shard, steps: int) -> Tensors:
    """The request's tensors after that many local steps on the client's training part."""
    job = learner.job
    epochs = math.ceil(steps / math.ceil(len(shard) / job.train.batch_size))
    longer = job.model_copy(update={"train": job.train.model_copy(update={"epochs": epochs})})
    # In an order of its own, that of the round which would be next.
    round = request.round + 1
    if learner.trains_on_features:
        examples = FeatureTable.of(learner.training_features(shard), shard.table, job.train.device)
        local = HeadTrainingConfig(longer, head_loss(job, learner.task.head_loss), round, steps=steps)
        work = ClientRows(client, np.arange(len(shard)))
        update = train_heads(request.tensors, examples, [work], local)[0]
    else:
        update = train_model(
            learner, request.tensors, shard, longer, client=client, round=round, plan={}, steps=steps
        )
    moved = {name: request.tensors[name] + delta for name, delta in update.delta.items()}
    return {**request.tensors, **moved}
