"""Single examples on their way through a network: with draws of their own, and each with its own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

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


@dataclass(frozen=True)
class PrivateExamples:
    """A client's examples in one step; `numbers` are what the draws of each are made of."""

    learner: Learner
    shard: Shard
    numbers: Numbers
    step: Step

    def gradients_of(self, gradients: PerExampleGradients, rows: Sequence[int]) -> Tensors:
        """The gradients of those rows, [rows, …] by parameter, as each would have it in any other batch.

        A single row passes twice: what a network draws for all alike has the shape of a batch of one.
        """
        passing = [*rows, *rows] if len(rows) == 1 else list(rows)
        numbers = self.numbers[np.array(passing, dtype=np.int64)]
        varied = example_variation(numbers, self.learner.job, self.step)
        batch = self.learner.batch(self.shard, passing, varied)
        found = batch_gradients(
            self.learner, gradients, batch, self.shard.targets_of(passing), numbers, self.step
        )
        return {name: g[: len(rows)] for name, g in found.items()}


def batch_gradients(
    learner: Learner,
    gradients: PerExampleGradients,
    batch: Batch,
    targets: torch.Tensor,
    numbers: Numbers,
    step: Step,
) -> Tensors:
    """Every example's gradient, [batch, …] by parameter; what is drawn for it comes of its own number."""
    there, aims = on_device(learner, batch, targets)
    # A GPU's fused attention draws its dropout where nobody sees it.
    fused = sdpa_kernel(SDPBackend.MATH) if is_gpu(learner.job.train.device) else nullcontext()
    with fused, example_draws(numbers, learner.job.seed, step):
        return gradients(there, aims)


def on_device(learner: Learner, batch: Batch, targets: torch.Tensor) -> tuple[Batch, torch.Tensor]:
    """A batch and its targets where the job computes."""
    device = learner.job.train.device
    return {name: t.to(device) for name, t in batch.items()}, targets.to(device)
