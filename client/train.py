"""Local training by autograd: one client after the other, the loop written out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from client.batches import batches
from client.steps import torch_optimizer
from protocol.job import Job
from protocol.messages import Update
from protocol.streams import global_stream, stream
from protocol.tensors import Tensors
from tasks import tuning
from tasks.learner import Learner
from tasks.seam import Shard, Variation


def train_model(
    learner: Learner,
    tensors: Tensors,
    shard: Shard,
    job: Job,
    *,
    client: str,
    round: int,
    plan: Mapping[str, float],
) -> Update:
    """Train from the global tensors on one shard; the update is how far they moved."""
    device, mu = job.train.device, plan.get("proximal_mu", 0.0)
    model = learner.model
    tuning.load_values(model, tensors)
    tuning.training_mode(model)
    parameters = tuning.trainable(model)
    start = tuning.values(model)
    optimizer = torch_optimizer(list(parameters.values()), job.train)
    summed, loss_of = 0.0, learner.training_loss(shard)
    with global_stream(job.seed, "dropout", round, client):
        for number, rows in enumerate(batches(len(shard), job, round, client)):
            batch = learner.batch(shard, rows, variation(job, round, client, number))
            outputs = model({name: t.to(device) for name, t in batch.items()})
            loss = loss_of(outputs, shard.targets_of(rows).to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if mu:
                pull_back(parameters, start, mu)
            optimizer.step()
            tuning.keep_pruned(model)
            summed += float(loss.detach()) * len(rows)
    count = float(len(shard) * job.train.epochs)
    return Update(
        client=client,
        round=round,
        delta={name: (tuning.in_order(p.detach()) - start[name]).cpu() for name, p in parameters.items()},
        num_examples=len(shard),
        states={
            "train_loss.sum": torch.tensor(summed).double(),
            "train_loss.count": torch.tensor(count).double(),
        },
    )


def variation(job: Job, round: int, client: str, number: int) -> Variation | None:
    """How the inputs of a round's batch vary at random; not at all, unless the job says so."""
    if not job.train.augment:
        return None
    draw = stream(job.seed, "augment", round, client, number)
    return Variation(job.train.augment, lambda place: draw)


def pull_back(parameters: Mapping[str, torch.nn.Parameter], start: Tensors, mu: float) -> None:
    """Add FedProx's gradient mu (w - w_global) (Li et al. 2020)."""
    for name, p in parameters.items():
        if p.grad is not None:
            p.grad += mu * (p.detach() - start[name])
