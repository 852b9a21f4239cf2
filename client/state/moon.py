"""MOON's client (Li et al. 2021): stores its last model. `strategies/unlike_shards/moon.py` has the symbols.

The model after a round's local training is stored with the prefix `own/` before the update is sent, so that a
repeated round or a resumed run contrasts with the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from atoll.client.state.personalization import keep_own, own_tensors, whole_model
from atoll.client.state.store import ClientStateStore
from atoll.client.training.local_sgd import train_model
from atoll.client.training.moon import ModelContrast
from atoll.data.shard import Shard
from atoll.job.extension_options import validated
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.requests import TrainRequest
from atoll.strategies.options import MoonOptions


def train_moon(
    learner: Learner,
    request: TrainRequest,
    clients: Sequence[str],
    shard_of: Callable[[str], Shard],
    memory: ClientStateStore,
) -> Iterator[Update]:
    """Each client's update, one after the other; its model is stored before the update is returned."""
    job = learner.job
    options = validated(MoonOptions, job.strategy.options or {}, "strategy.options")
    assert isinstance(options, MoonOptions)
    for client in clients:
        client_tensors = own_tensors(request, client, request.round, memory)
        previous = whole_model(learner, request, client, client_tensors)
        contrast = ModelContrast(request.tensors, previous, options.mu, options.temperature)
        update = train_model(
            learner, request.tensors, shard_of(client), job,
            client=client, round=request.round, plan=request.plan,
            contrast=contrast if client_tensors else None,
        )  # fmt: skip
        keep_own(request, [update], memory)
        yield update
