"""The statistics from which the server computes a head in closed form: sums over a client's features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from atoll.client.dp.dp_sgd import DpSgd
from atoll.data.shard import Shard
from atoll.learning.learner import Learner
from atoll.privacy.noise import RandomBits, lattice_for
from atoll.protocol.messages import CHARGED_ROUNDS, Measurement
from atoll.protocol.tensors import Tensors
from atoll.strategies.closed_form import STATISTICS
from atoll.strategies.private_closed_form import SENSITIVITY, bounded_sums
from atoll.strategies.random_features import random_features


def statistics(
    learner: Learner, round: int, shards: Mapping[str, Shard], private: DpSgd | None = None
) -> Iterator[Measurement]:
    """Each client's statistics of its training part, without augmentation.

    Each client's come from matrix products of its own, so their bits do not depend on the other clients.
    """
    if learner.job.privacy.units:
        yield from _under_a_promise(learner, round, shards, private)
        return
    kind, classes = learner.job.tune.head_init, len(learner.data_info["classes"])
    assert kind is not None
    hidden = _hidden_layer(learner)
    for name, shard in shards.items():
        inputs = random_features(learner.features.plain(shard), hidden)
        sums = STATISTICS[kind](inputs, shard.table, classes)
        yield Measurement(name, round, len(shard), sums)


def _under_a_promise(
    learner: Learner, round: int, shards: Mapping[str, Shard], private: DpSgd | None
) -> Iterator[Measurement]:
    """Statistics that one unit changes by at most `SENSITIVITY` in L2 norm, noised where `private` is given.

    Nothing else that depends on the shard is sent, such as its number of examples.
    """
    hidden = _hidden_layer(learner)
    for name, shard in shards.items():
        total = _sums_of_bounded(learner, shard, hidden)
        if private is None:
            yield Measurement(name, round, 1, client_mean(total, len(shard)))
            continue
        noised = noised_sums(total, private.noise_multiplier, private.random_bits(name))
        charged = torch.tensor(private.charged.get(name, 0), dtype=torch.float64)
        yield Measurement(name, round, 1, noised | {CHARGED_ROUNDS: charged})


def _sums_of_bounded(learner: Learner, shard: Shard, hidden: Tensors) -> Tensors:
    """The exact sums over a shard, with the inputs of the head's last layer clipped to the job's norm."""
    tune, classes = learner.job.tune, len(learner.data_info["classes"])
    assert tune.head_init is not None and tune.feature_norm is not None
    inputs = random_features(learner.features.plain(shard), hidden)
    return bounded_sums(tune.head_init, inputs, shard.table, classes, tune.feature_norm)


def _hidden_layer(learner: Learner) -> Tensors:
    """The model whose hidden layer the seed draws, for `random_features`; empty for a linear head."""
    return {} if learner.job.tune.hidden is None else learner.initial()


def client_mean(total: Tensors, examples: int) -> Tensors:
    """The sums over a client's examples divided by their number, for privacy whose unit is the client."""
    return {name: tensor / max(examples, 1) for name, tensor in total.items()}


def noised_sums(total: Tensors, noise_multiplier: float, random_bits: RandomBits) -> Tensors:
    """One discrete Gaussian release of all the numbers together, in the order of the blocks' names."""
    names = sorted(total)
    numbers = torch.cat([total[name].reshape(-1) for name in names]).numpy()
    noisy = lattice_for(noise_multiplier, SENSITIVITY, len(numbers), random_bits).added(numbers)
    parts = torch.split(torch.from_numpy(noisy), [total[name].numel() for name in names])
    return {name: part.reshape(total[name].shape) for name, part in zip(names, parts, strict=True)}
