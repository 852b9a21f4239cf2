"""Per-example gradients whose random draws belong to single examples, not to batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll.backbones.encoder import Batch
from atoll.client.dp.example_draws import Numbers, Step, example_draws, example_variation
from atoll.client.dp.per_example_gradients import PerExampleGradients
from atoll.data.shard import Shard
from atoll.learning.determinism import is_gpu
from atoll.learning.learner import Learner
from atoll.protocol.tensors import Tensors

Passed = TypeVar("Passed")


@dataclass(frozen=True)
class PrivateExamples:
    """A client's examples in one step; `numbers` [n] seed each example's random draws."""

    learner: Learner
    shard: Shard
    numbers: Numbers
    step: Step

    def gradients_of(self, gradients: PerExampleGradients, rows: Sequence[int]) -> Tensors:
        """The gradients of these rows, [rows, …] by parameter, the same as in any other batch."""
        return {name: g[: len(rows)] for name, g in self.passed(gradients, rows).items()}

    def passed(self, passes: Callable[[Batch, torch.Tensor], Passed], rows: Sequence[int]) -> Passed:
        """What `passes` returns for the batch of these rows, with the random draws of each.

        A single row is computed as a batch of two, since a draw that all examples share has the shape of a
        batch of one.
        """
        passing = [*rows, *rows] if len(rows) == 1 else list(rows)
        numbers = self.numbers[np.array(passing, dtype=np.int64)]
        varied = example_variation(numbers, self.learner.job, self.step)
        batch = self.learner.batch(self.shard, passing, varied)
        return passed_batch(self.learner, passes, batch, self.shard.targets_of(passing), numbers, self.step)


def passed_batch(
    learner: Learner,
    passes: Callable[[Batch, torch.Tensor], Passed],
    batch: Batch,
    targets: torch.Tensor,
    numbers: Numbers,
    step: Step,
) -> Passed:
    """What `passes` returns for a batch, such as every example's gradient, [batch, …] by parameter.

    An example's random draws follow from its own number.
    """
    there, aims = on_device(learner, batch, targets)
    # A GPU's fused attention draws its dropout where nobody sees it.
    fused = sdpa_kernel(SDPBackend.MATH) if is_gpu(learner.job.train.device) else nullcontext()
    with fused, example_draws(numbers, learner.job.seed, step):
        return passes(there, aims)


def on_device(learner: Learner, batch: Batch, targets: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """A batch and its targets, moved to the job's device."""
    device = learner.job.train.device
    return {name: t.to(device) for name, t in batch.items()}, targets.to(device)
