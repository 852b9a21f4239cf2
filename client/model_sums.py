"""Distributed DP-SGD for any model: the clipped gradients of one Poisson batch, client by client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from client.gradients import per_example_gradients
from client.per_example import PerExample
from client.train_private import clipped_sum, hooks_suffice_for
from protocol.tensors import Tensors
from tasks import tuning
from tasks.learner import Learner
from tasks.seam import Shard


def model_sums(
    learner: Learner, tensors: Tensors, shards: Mapping[str, Shard], private: PerExample, round: int
) -> Iterator[tuple[str, Tensors]]:
    """(client, the sum over its batch of clipped gradients); zeros for no batch."""
    model = learner.model
    tuning.load_values(model, tensors)
    tuning.training_mode(model)
    assert private.draw is not None
    for client, shard in shards.items():
        hooks = hooks_suffice_for(learner, shard)
        rows = private.draw(client, len(shard))[0]
        with per_example_gradients(model, learner.training_loss(shard), hooks=hooks) as found:
            yield client, clipped_sum(learner, found, shard, rows, private, (round, client, 0))
