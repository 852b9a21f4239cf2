"""Local training of several clients at once by torch.func: for any model, with bits of its own.

One vectorised map over the clients takes every client's gradient in one go (functional calls with
stacked parameters). The arithmetic is that of `local_sgd.py`, summed in another order; dropout is
drawn for all of them together. Updates agree to about 1e-5 with SGD; Adam divides by the size of a
gradient, so where that is rounding noise its steps differ at will. Hence this is never done unless
it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll.backbones.checkpoint import force_attention_mask
from atoll.backbones.encoder import Batch, Variation
from atoll.client.training.batches import batches
from atoll.client.training.learning_rates import StepRates, layer_rates
from atoll.client.training.local_sgd import variation
from atoll.client.training.local_steps import examples_seen
from atoll.client.training.optimizers import clip_stacked, make_optimizer
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import global_stream
from atoll.protocol.stacked_updates import StackedUpdates, joined
from atoll.protocol.tensors import Tensors

CLIENTS_PER_VMAP = 16
"""How many clients are trained together; memory grows with the number."""


def vmap_training(
    learner: Learner,
    tensors: Tensors,
    shards: Mapping[str, Shard],
    job: Job,
    *,
    round: int,
    plan: Mapping[str, float],
) -> StackedUpdates:
    """The clients' updates after training from the global tensors, in the order of `shards`."""
    for shard in shards.values():
        learner.keep_states(shard)
    trainable.training_mode(learner.model)
    force_attention_mask(learner.model)
    # Those with most batches first: whoever still trains at a step is then a prefix.
    order = sorted(shards, key=lambda name: -len(shards[name]))
    parts = []
    for start in range(0, len(order), CLIENTS_PER_VMAP):
        names = order[start : start + CLIENTS_PER_VMAP]
        with global_stream(job.seed, "dropout", round, names[0]):
            parts.append(_train(learner, tensors, {n: shards[n] for n in names}, job, round, plan))
    return joined(parts).of_clients(list(shards))


@dataclass(frozen=True)
class _Item:
    """One client's batch of a step, and its place in the stack."""

    place: int
    batch: Batch
    targets: torch.Tensor


def _train(
    learner: Learner,
    tensors: Tensors,
    shards: Mapping[str, Shard],
    job: Job,
    round: int,
    plan: Mapping[str, float],
) -> StackedUpdates:
    device, mu = job.train.device, plan.get("proximal_mu", 0.0)
    trainable.load_values(learner.model, tensors)
    start = trainable.to_parameters(trainable.trainable(learner.model), tensors)
    now = {name: t.unsqueeze(0).repeat(len(shards), *[1] * t.dim()) for name, t in start.items()}
    step = {name: make_optimizer(job.train) for name in now}
    rows = [batches(len(shard), job, round, name) for name, shard in shards.items()]
    rates = StepRates.of(job, round, [len(schedule) for schedule in rows], device)
    of_layer = layer_rates(learner.model, job.train)
    losses = torch.zeros(len(shards), dtype=torch.float64)
    reached = _reached(learner, next(iter(shards.values())), rows[0][0])
    for s in range(len(rows[0])):
        items = [
            _item(learner, shard, i, rows[i][s], variation(job, round, name, s))
            for i, (name, shard) in enumerate(shards.items())
            if s < len(rows[i])
        ]
        gradient = {name: torch.zeros_like(t[: len(items)]) for name, t in now.items()}
        for group in _of_one_size(items):
            _add_gradients(learner, now, group, gradient, losses, device)
        for name in reached if mu else ():
            gradient[name] += mu * (now[name][: len(items)] - start[name])
        clip_stacked([gradient[name] for name in reached], job.train.clip_norm)
        for name in reached:
            lr = rates.at(s, len(items)) * of_layer.get(name, 1.0)
            step[name](now[name][: len(items)], gradient[name], lr)
    counts = tuple(len(shard) for shard in shards.values())
    return StackedUpdates(
        clients=tuple(shards),
        round=round,
        delta={name: (t - start[name]).cpu() for name, t in now.items()},
        num_examples=counts,
        states={
            "train_loss.sum": losses,
            "train_loss.count": examples_seen(counts, job.train),
        },
    )


def _item(
    learner: Learner, shard: Shard, place: int, rows: Sequence[int], varied: Variation | None = None
) -> _Item:
    return _Item(place, learner.batch(shard, rows, varied), shard.targets_of(rows))


def _reached(learner: Learner, shard: Shard, rows: Sequence[int]) -> list[str]:
    """Names of the parameters that the loss depends on; the others do not move, as in torch's optimizers."""
    model, item = learner.model, _item(learner, shard, 0, rows)
    device = learner.job.train.device
    outputs = model({name: t.to(device) for name, t in item.batch.items()})
    parameters = trainable.trainable(model)
    loss = learner.task.loss(outputs, item.targets.to(device))
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return [name for name, g in zip(parameters, gradients, strict=True) if g is not None]


def _of_one_size(items: Sequence[_Item]) -> list[list[_Item]]:
    """The items in groups with equally many examples, which can be stacked without gaps."""
    groups: dict[int, list[_Item]] = {}
    for item in items:
        groups.setdefault(len(item.targets), []).append(item)
    return list(groups.values())


def _add_gradients(
    learner: Learner,
    now: Tensors,
    group: Sequence[_Item],
    gradient: Tensors,
    losses: torch.Tensor,
    device: str,
) -> None:
    """Write each item's gradient to its place in `gradient`, and add its summed loss to `losses`."""
    places = torch.tensor([item.place for item in group])
    tensors = {name: t[places.to(device)] for name, t in now.items()}
    batch = {name: t.to(device) for name, t in _stacked([item.batch for item in group]).items()}
    targets = torch.stack([item.targets for item in group]).to(device)

    def loss(parameters: Tensors, batch: Batch, targets: torch.Tensor) -> torch.Tensor:
        outputs = functional_call(learner.model, parameters, (batch,))
        return learner.task.loss(outputs, targets)

    # Of attention's ways only the plain one has a rule for maps.
    with sdpa_kernel(SDPBackend.MATH):
        gradients, value = vmap(grad_and_value(loss), randomness="different")(tensors, batch, targets)
    for name, g in gradients.items():
        gradient[name][places.to(device)] = g
    losses[places] += value.detach().cpu().double() * targets.shape[1]


def _stacked(parts: Sequence[Batch]) -> Batch:
    """The clients' batches as [clients, batch, …]; shorter texts are padded with zeros, excluded by masks."""
    stacked = {}
    for name in parts[0]:
        shape = [max(sizes) for sizes in zip(*(part[name].shape for part in parts), strict=True)]
        table = parts[0][name].new_zeros((len(parts), *shape))
        for target, part in zip(table, parts, strict=True):
            target[tuple(slice(size) for size in part[name].shape)] = part[name]
        stacked[name] = table
    return stacked
