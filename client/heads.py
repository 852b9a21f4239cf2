"""Linear heads on features, a whole cohort at once; one real client is a cohort of one.

Heads are stacked to [clients, outputs, width] and every local step is a few batched matrix
products with the gradient in closed form. A client's numbers are the same bits whoever else
is in the cohort, because every slice has a shape of its own client's making: widths are
padded with zeros to a multiple of 16 (rows then start on cache lines), batches to a size that
depends on the client alone, and element-wise steps are single operations, never fused ones.
That was seen to hold with one thread; the number of threads is fixed by the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from client.batches import batches
from client.steps import stepper
from protocol.job import Job
from protocol.messages import Update
from protocol.tensors import Tensors

ALIGN = 16


@dataclass(frozen=True)
class HeadWork:
    """One client's part of a round: features [n, width] and targets [n]."""

    client: str
    features: torch.Tensor
    targets: torch.Tensor


def train_heads(
    head: Tensors, works: Sequence[HeadWork], job: Job, round: int, plan: Mapping[str, float]
) -> list[Update]:
    """Local training of `head.weight` [outputs, width] and `head.bias` [outputs] at every client.

    Softmax cross-entropy, mean over the batch; the updates come in the order of `works`.
    """
    groups: dict[int, list[HeadWork]] = {}
    for work in works:
        groups.setdefault(_rows_per_batch(len(work.targets), job.train.batch_size), []).append(work)
    updates = [u for rows, group in groups.items() for u in _train_group(head, group, rows, job, round, plan)]
    place = {work.client: i for i, work in enumerate(works)}
    return sorted(updates, key=lambda update: place[update.client])


def _rows_per_batch(count: int, batch_size: int) -> int:
    """Rows a batch is padded to: at least two, and a power of two where the shard is smaller."""
    fitting: int = 1 << max(count - 1, 1).bit_length()
    return max(2, min(batch_size, fitting))


@dataclass(frozen=True)
class _Cohort:
    """A group's examples in one table, and which rows each client's steps take.

    Clients are sorted so that those with most steps come first: those still training at
    any step are then a prefix. `rows` is [clients, steps, batch] into the table, with
    the first row where a batch is padded; `share` is 1 / batch size, or 0 for padding.
    """

    table: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    share: torch.Tensor
    steps: list[int]


def _train_group(
    head: Tensors, works: list[HeadWork], rows: int, job: Job, round: int, plan: Mapping[str, float]
) -> list[Update]:
    plans = {work.client: batches(len(work.targets), job, round, work.client) for work in works}
    works = sorted(works, key=lambda work: -len(plans[work.client]))
    cohort = _assemble(works, [plans[w.client] for w in works], rows, job.train.device)
    start = _stack(head, len(works), cohort.table.shape[1], job.train.device)
    now = {name: tensor.clone() for name, tensor in start.items()}
    losses = _descend(now, start, cohort, job, plan.get("proximal_mu", 0.0))
    width = head["head.weight"].shape[1]
    delta = {name: (now[name] - start[name]).cpu() for name in now}
    return [
        Update(
            client=work.client,
            round=round,
            delta={
                "head.weight": delta["weight"][i, :, :width].clone(),
                "head.bias": delta["bias"][i].clone(),
            },
            num_examples=len(work.targets),
            states={
                "train_loss.sum": losses[i].cpu(),
                "train_loss.count": torch.tensor(float(len(work.targets) * job.train.epochs)).double(),
            },
        )
        for i, work in enumerate(works)
    ]


def _assemble(works: list[HeadWork], plans: list[list[list[int]]], rows: int, device: str) -> _Cohort:
    width = works[0].features.shape[1]
    padded = -(-width // ALIGN) * ALIGN
    table = torch.zeros((sum(len(w.targets) for w in works), padded))
    index = torch.zeros((len(works), len(plans[0]), rows), dtype=torch.int64)
    share = torch.zeros((len(works), len(plans[0]), rows))
    offset = 0
    for i, (work, plan) in enumerate(zip(works, plans, strict=True)):
        table[offset : offset + len(work.targets), :width] = work.features
        index[i] = offset
        for step, batch in enumerate(plan):
            index[i, step, : len(batch)] = torch.tensor(batch, dtype=torch.int64) + offset
            share[i, step, : len(batch)] = 1.0 / len(batch)
        offset += len(work.targets)
    targets = torch.cat([work.targets for work in works])
    return _Cohort(
        table.to(device),
        targets.to(device),
        index.to(device),
        share.to(device),
        steps=[len(plan) for plan in plans],
    )


def _stack(head: Tensors, clients: int, padded: int, device: str) -> Tensors:
    outputs, width = head["head.weight"].shape
    weight = torch.zeros((clients, outputs, padded))
    weight[:, :, :width] = head["head.weight"]
    return {"weight": weight.to(device), "bias": head["head.bias"].repeat(clients, 1).to(device)}


def _descend(now: Tensors, start: Tensors, cohort: _Cohort, job: Job, mu: float) -> torch.Tensor:
    """Move `now` in place through all local steps; each client's summed loss, [clients]."""
    step = {name: stepper(job.train) for name in now}
    losses = torch.zeros(len(cohort.steps), dtype=torch.float64, device=now["bias"].device)
    ones = torch.ones((len(cohort.steps), cohort.rows.shape[2], 2), device=now["bias"].device)
    for s in range(cohort.rows.shape[1]):
        active = sum(count > s for count in cohort.steps)
        inputs = cohort.table[cohort.rows[:active, s]]
        targets = cohort.targets[cohort.rows[:active, s]]
        share = cohort.share[:active, s]
        logits = torch.bmm(inputs, now["weight"][:active].transpose(1, 2)) + now["bias"][:active].unsqueeze(1)
        error = _softmax_error(logits, targets, share)
        gradient = {
            "weight": torch.bmm(error.transpose(1, 2), inputs),
            "bias": torch.bmm(error.transpose(1, 2), ones[:active])[:, :, 0].contiguous(),
        }
        losses[:active] += _summed_loss(logits, targets, share)
        for name, tensor in now.items():
            g = gradient[name]
            if mu:
                g = g + (tensor[:active] - start[name][:active]) * mu
            step[name](tensor[:active], g)
    return losses


def _softmax_error(logits: torch.Tensor, targets: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Gradient of the mean cross-entropy in the logits: (softmax - one-hot) / batch size."""
    one_hot = torch.zeros_like(logits).scatter_(2, targets.unsqueeze(2), 1.0)
    return (torch.softmax(logits, dim=2) - one_hot) * share.unsqueeze(2)


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    log_likelihood = torch.log_softmax(logits, dim=2).gather(2, targets.unsqueeze(2)).squeeze(2)
    return -(log_likelihood * (share > 0)).to(torch.float64).sum(dim=1)
