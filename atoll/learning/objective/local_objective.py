"""A client's objective: which loss its training minimises, on which targets, and which examples it draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning.objective.class_imbalance import Imbalance, counts_of
from atoll.protocol.messages import DataInfo
from atoll.tasks.task import Task

if TYPE_CHECKING:
    from atoll.learning.objective.distillation import Teacher

TrainingLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs [n, ...], targets [n, ...]) to the batch's mean loss."""


@dataclass
class LocalObjective:
    """What a job's clients minimise in training; it differs from what is measured.

    `data_info` is what all clients agreed on: its `classes` are counted. With a `teacher`, targets and loss
    are those of distillation.
    """

    job: Job
    task: Task
    data_info: DataInfo
    teacher: Teacher | None = None

    def loss(self, shard: Shard) -> TrainingLoss:
        """The training loss of a client with this shard: the task's, or one corrected for class imbalance."""
        imbalance, smoothing = Imbalance.of(self.job), self.job.train.label_smoothing
        if self.teacher is not None:
            return self.teacher.loss
        if smoothing is not None:
            return partial(nn.functional.cross_entropy, label_smoothing=smoothing)
        if imbalance is None:
            return self.task.loss
        return imbalance.loss(counts_of(shard.table, len(self.data_info["classes"])))

    def chances(self, shard: Shard) -> NDArray[np.float64] | None:
        """The probability of each example in training draws, [n]; None where every epoch takes all."""
        imbalance = Imbalance.of(self.job)
        return None if imbalance is None else imbalance.chances(shard.table)

    def with_soft_labels(self, shard: Shard) -> Shard:
        """The shard for training: with a teacher, targets are [n, 1 + classes] with its probabilities."""
        return shard if self.teacher is None else self.teacher.with_soft_labels(shard)
