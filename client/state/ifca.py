"""IFCA's client (Ghosh et al. 2020, algorithm 1); `strategies/personal/ifca.py` has the symbols.

F_i(theta_j) is the task's loss of cluster j's model over all of the client's training examples, without the
augmentation, dropout or class weights that training may have. The choice is not stored: it is made anew
whenever the client trains or evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from atoll.data.shard import Shard
from atoll.learning.learner import Learner
from atoll.protocol.messages import CLUSTER, Update
from atoll.protocol.requests import TrainRequest
from atoll.protocol.stacked_updates import with_state
from atoll.protocol.tensors import Tensors
from atoll.strategies.personal.ifca import clusters_in, model_of_cluster

Train = Callable[[TrainRequest, Sequence[str]], Iterable[Update]]
"""(request with one model, the clients that train it) to their updates."""


def fitting_cluster(learner: Learner, tensors: Tensors, shard: Shard) -> int:
    """The number of the stacked model with the least loss on a shard; 0 for a shard without examples."""
    if not len(shard):
        return 0
    losses = []
    for number in range(clusters_in(tensors)):
        outputs = learner.outputs(model_of_cluster(tensors, number), shard)
        losses.append(float(learner.task.loss(outputs.to(torch.float64), shard.table)))
    return losses.index(min(losses))


def train_clusters(
    learner: Learner,
    request: TrainRequest,
    clients: Sequence[str],
    shard_of: Callable[[str], Shard],
    train: Train,
) -> Iterator[Update]:
    """Each client's update of the model with the least loss, with that model's number, in the clients' order.

    The heads of a cluster are trained together, whole networks one client after the other.
    """
    chosen = ((name, fitting_cluster(learner, request.tensors, shard_of(name))) for name in clients)
    if not learner.trains_on_features:
        for name, number in chosen:
            yield from _trained(request, number, [name], train)
        return
    members: dict[int, list[str]] = {}
    for name, number in chosen:
        members.setdefault(number, []).append(name)
    updates = {
        u.client: u for number, names in members.items() for u in _trained(request, number, names, train)
    }
    yield from (updates[name] for name in clients)


def _trained(request: TrainRequest, number: int, clients: Sequence[str], train: Train) -> Iterable[Update]:
    one = replace(request, tensors=model_of_cluster(request.tensors, number))
    return with_state(train(one, clients), CLUSTER, lambda _client, _examples: float(number))
