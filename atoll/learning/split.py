"""Which of a client's examples are trained on and which are measured, each decided by its content alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.validation_split import helps_clients, kept_back, validation_marks
from atoll.tasks.task import Task


def split_shard(job: Job, task: Task, shard: Shard) -> tuple[Shard, Shard]:
    """(training part, validation part) of a client's shard, by the task's `split` or by hashes.

    With `data.shots` the training part has so many examples of each class.
    """
    helped = helps_clients(job)
    if task.has_own_split:
        train, validation = task.split(shard, job.seed, job.data.validation_fraction, helped=helped)
        return shard.select(train), shard.select(validation)
    marks = validation_marks(shard.keys, job.seed)
    measured = kept_back(marks, job.data, helped=helped)
    train = training_rows(marks, measured, shard, job.data.shots)
    return shard.select(train), shard.select(np.flatnonzero(measured).tolist())


def first_per_class(rows: Sequence[int], shard: Shard, shots: int) -> list[int]:
    """The first `shots` of these rows of every class, in the order given."""
    seen: Counter[int] = Counter()
    chosen = []
    for row, label in zip(rows, shard.table[torch.tensor(rows, dtype=torch.int64)].tolist(), strict=True):
        seen[label] += 1
        if seen[label] <= shots:
            chosen.append(row)
    return chosen


def training_rows(
    marks: NDArray[np.uint64], measured: NDArray[np.bool_], shard: Shard, shots: int | None
) -> list[int]:
    """The training rows, in order: those not `measured`, or with `shots` so many of each class.

    Of each class those with the lowest marks are taken.
    """
    if shots is None:
        return np.flatnonzero(~measured).tolist()
    order = np.argsort(marks, kind="stable")
    return sorted(first_per_class(order[~measured[order]].tolist(), shard, shots))


def check_shots(job: Job, task: Task) -> None:
    """Raises ConfigError where the task has no classes to count by, or a promise would break."""
    if job.data.shots is None:
        return
    if task.has_own_split or not (task.uses_pooled_features and task.head_loss == "softmax"):
        raise ConfigError(f"data.shots: {task.name} has no examples of one class each, expected none")
    if "example" in job.privacy.units:
        raise ConfigError(
            "data.shots: which examples are taken would depend on one that is promised privacy; expected"
            f" none with privacy.unit = {job.privacy.unit!r}"
        )
