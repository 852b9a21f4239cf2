"""Linear heads on features, a whole cohort at once; one real client is a cohort of one.

Heads are stacked to [clients, outputs, width] and every local step is a few batched matrix
products with the gradient in closed form. A client's numbers are the same bits whoever else
is in the cohort, because every slice has a shape of its own client's making: widths are
padded with zeros to a multiple of 16 (rows then start on cache lines), batches to a size that
depends on the client alone, and element-wise steps are single operations, never fused ones.
That was seen to hold with one thread; the number of threads is fixed by the job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.batches import epoch_seeds, permutations, view_numbers
from client.steps import stepper
from protocol.cohort import StackedUpdates, joined
from protocol.job import Job
from protocol.tensors import Tensors

ALIGN = 16


@dataclass(frozen=True)
class Examples:
    """Features [views * n, padded width] and their targets, which several clients' rows point into.

    View v of example i is in row v * n + i.
    """

    features: torch.Tensor
    targets: torch.Tensor
    views: int = 1

    @classmethod
    def of(cls, features: torch.Tensor, targets: torch.Tensor, device: str = "cpu") -> Examples:
        """Features [n, width] or [views, n, width] of targets [n], on their device.

        Zeros stand behind the features, up to a multiple of 16 columns.
        """
        padding = -features.shape[-1] % ALIGN
        views = len(features) if features.ndim == 3 else 1
        padded = torch.nn.functional.pad(features, (0, padding)).contiguous()
        return cls(padded.flatten(0, -2).to(device), targets.repeat(views).to(device), views)

    @property
    def count(self) -> int:
        """How many examples there are, whatever their views."""
        return len(self.targets) // self.views


@dataclass(frozen=True)
class HeadWork:
    """One client's part of a round: its rows of the examples, in the first view."""

    client: str
    rows: NDArray[np.int64]


def train_heads(
    head: Tensors,
    examples: Examples,
    works: Sequence[HeadWork],
    job: Job,
    round: int,
    plan: Mapping[str, float],
) -> StackedUpdates:
    """Local training of `head.weight` [outputs, width] and `head.bias` [outputs] at every client.

    Softmax cross-entropy, mean over the batch; the updates come in the order of `works`.
    """
    groups: dict[int, list[HeadWork]] = {}
    for work in works:
        groups.setdefault(rows_per_batch(len(work.rows), job.train.batch_size), []).append(work)
    parts = [_train_group(head, examples, g, size, job, round, plan) for size, g in groups.items()]
    trained = joined(parts)
    place = {client: i for i, client in enumerate(trained.clients)}
    return trained.take([place[work.client] for work in works])


def rows_per_batch(count: int, batch_size: int) -> int:
    """Rows a batch is padded to: at least two, and a power of two where the shard is smaller."""
    fitting: int = 1 << max(count - 1, 1).bit_length()
    return max(2, min(batch_size, fitting))


@dataclass(frozen=True)
class _Schedule:
    """Which rows each client's steps take; clients with most steps come first.

    Those still training at any step are then a prefix. `rows` is [steps, clients, batch] into
    the examples, the client's first row where a batch is padded; `share` is 1 / batch size, or 0
    for padding; `steps` counts each client's.
    """

    works: list[HeadWork]
    rows: torch.Tensor
    share: torch.Tensor
    steps: list[int]


def _train_group(
    head: Tensors,
    examples: Examples,
    works: list[HeadWork],
    size: int,
    job: Job,
    round: int,
    plan: Mapping[str, float],
) -> StackedUpdates:
    device = job.train.device
    schedule = _schedule(works, size, job, round, examples)
    start = _stack(head, len(works), examples.features.shape[1], device)
    now = {name: tensor.clone() for name, tensor in start.items()}
    losses = _descend(now, start, examples, schedule, job, plan.get("proximal_mu", 0.0))
    width = head["head.weight"].shape[1]
    counts = tuple(len(work.rows) for work in schedule.works)
    return StackedUpdates(
        clients=tuple(work.client for work in schedule.works),
        round=round,
        delta={
            "head.weight": (now["weight"].sub_(start["weight"]))[:, :, :width].cpu().contiguous(),
            "head.bias": now["bias"].sub_(start["bias"]).cpu(),
        },
        num_examples=counts,
        states={
            "train_loss.sum": losses.cpu(),
            "train_loss.count": torch.tensor(counts, dtype=torch.float64) * job.train.epochs,
        },
    )


def _schedule(works: list[HeadWork], size: int, job: Job, round: int, examples: Examples) -> _Schedule:
    works = sorted(works, key=lambda work: -len(work.rows))
    counts = np.array([len(work.rows) for work in works])
    per_epoch = -(-counts // job.train.batch_size)
    epochs = job.train.epochs
    seeds = [epoch_seeds(job, round, work.client) for work in works]
    own = np.zeros((len(works), counts.max()), dtype=np.int64)
    for i, work in enumerate(works):
        own[i, : counts[i]] = work.rows
    rows = np.repeat(own[:, :1, None], int(per_epoch[0]) * epochs * size, axis=2).reshape(
        len(works), int(per_epoch[0]) * epochs, size
    )
    share = np.zeros(rows.shape, dtype=np.float32)
    for epoch, seen in enumerate(_rows_seen(own, works, examples, job, round)):
        order = permutations(counts.tolist(), [s[epoch] for s in seeds])
        shuffled = np.take_along_axis(seen, order, axis=1)
        _lay_out(rows, share, shuffled, counts, min(job.train.batch_size, size), epoch)
    return _Schedule(
        works,
        torch.from_numpy(rows.transpose(1, 0, 2).copy()).to(job.train.device),
        torch.from_numpy(share.transpose(1, 0, 2).copy()).to(job.train.device),
        (per_epoch * epochs).tolist(),
    )


def _rows_seen(
    own: NDArray[np.int64], works: list[HeadWork], examples: Examples, job: Job, round: int
) -> Iterator[NDArray[np.int64]]:
    """Each epoch's rows of every client, [clients, rows]: in views drawn from the client's stream."""
    drawn = [epoch_seeds(job, round, work.client, "view") for work in works] if examples.views > 1 else []
    for epoch in range(job.train.epochs):
        if drawn:
            views = view_numbers(examples.views, [seeds[epoch] for seeds in drawn], own.shape[1])
            yield own + examples.count * views
        else:
            yield own


def _lay_out(
    rows: NDArray[np.int64],
    share: NDArray[np.float32],
    shuffled: NDArray[np.int64],
    counts: NDArray[np.int64],
    batch: int,
    epoch: int,
) -> None:
    """Write one epoch's batches behind the epochs before it; clients of equal count all at once."""
    for count in np.unique(counts).tolist():
        members = np.flatnonzero(counts == count)
        steps = -(-count // batch)
        filled = np.zeros((len(members), steps * batch), dtype=np.int64)
        filled[:, :count] = shuffled[members, :count]
        filled[:, count:] = shuffled[members, :1]
        weights = np.zeros(steps * batch, dtype=np.float32)
        weights[:count] = 1.0 / batch
        weights[(steps - 1) * batch : count] = 1.0 / (count - (steps - 1) * batch)
        span = slice(epoch * steps, (epoch + 1) * steps)
        rows[members, span, :batch] = filled.reshape(-1, steps, batch)
        share[members, span, :batch] = weights.reshape(steps, batch)


def _stack(head: Tensors, clients: int, padded: int, device: str) -> Tensors:
    outputs, width = head["head.weight"].shape
    weight = torch.zeros((outputs, padded))
    weight[:, :width] = head["head.weight"]
    return {
        "weight": weight.to(device).repeat(clients, 1, 1),
        "bias": head["head.bias"].to(device).repeat(clients, 1),
    }


def _descend(
    now: Tensors, start: Tensors, examples: Examples, schedule: _Schedule, job: Job, mu: float
) -> torch.Tensor:
    """Move `now` in place through all local steps; each client's summed loss, [clients]."""
    step = {name: stepper(job.train) for name in now}
    losses = torch.zeros(len(schedule.steps), dtype=torch.float64, device=now["bias"].device)
    ones = torch.ones((len(schedule.steps), schedule.rows.shape[2], 2), device=now["bias"].device)
    for s in range(len(schedule.rows)):
        active = sum(count > s for count in schedule.steps)
        rows, share = schedule.rows[s, :active], schedule.share[s, :active]
        inputs = examples.features.index_select(0, rows.flatten()).view(*rows.shape, -1)
        targets = examples.targets[rows]
        logits = torch.bmm(inputs, now["weight"][:active].transpose(1, 2))
        logits += now["bias"][:active].unsqueeze(1)
        error, loss = _softmax_error(logits, targets, share)
        gradient = {
            "weight": torch.bmm(error.transpose(1, 2), inputs),
            "bias": torch.bmm(error.transpose(1, 2), ones[:active])[:, :, 0].contiguous(),
        }
        losses[:active] += loss
        for name, tensor in now.items():
            g = gradient[name]
            if mu:
                g += (tensor[:active] - start[name][:active]) * mu
            step[name](tensor[:active], g)
    return losses


def _softmax_error(
    logits: torch.Tensor, targets: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of the mean cross-entropy in the logits, each client's summed cross-entropy).

    The gradient is (softmax - one-hot) / batch size, [clients, batch, outputs].
    """
    probabilities = torch.softmax(logits, dim=2)
    place, share = targets.unsqueeze(2), share.unsqueeze(2)
    likelihood = probabilities.gather(2, place).clamp_min_(torch.finfo(torch.float32).tiny)
    loss = -(likelihood.log_() * (share > 0)).sum(dim=(1, 2), dtype=torch.float64)
    return probabilities.mul_(share).scatter_add_(2, place, -share), loss
