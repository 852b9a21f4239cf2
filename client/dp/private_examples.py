"""Per-example gradients whose random draws belong to single examples, not to batches.

So many examples pass together as there is memory for: 32 as a rule, fewer where they are large pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from atoll.backbones.encoder import Batch
from atoll.client.dp.example_draws import Numbers, Step, example_draws, example_variation
from atoll.client.dp.per_example_gradients import PerExampleGradients
from atoll.data.shard import Shard
from atoll.learning.determinism import is_gpu
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors

Passed = TypeVar("Passed")

MOST_EXAMPLES = 32
"""Noise is added once per step, after all parts."""
FEWEST_EXAMPLES = 2
"""Draws that all examples share have the shape of a batch of one, so a batch has two at least."""
MOST_NUMBERS = 2**28
"""How many numbers the layers of a network may make of a part's pictures; a gigabyte in float32."""

_counted: list[tuple[Learner, tuple[torch.Size, ...], int]] = []
"""The last learner, the shapes of an example's inputs, and how many numbers its layers make of it."""


@dataclass(frozen=True)
class PrivateExamples:
    """A client's examples in one step; `numbers` [n] seed each example's random draws."""

    learner: Learner
    shard: Shard
    numbers: Numbers
    step: Step

    @property
    def together(self) -> int:
        """How many examples pass together."""
        return examples_together(self.learner, self.shard)

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


def examples_together(learner: Learner, shard: Shard) -> int:
    """How many of a shard's examples pass together, from 2 to 32.

    It follows from the network and the shape of its pictures alone, which are the same at every site: a sum
    over other parts would be rounded otherwise. Examples whose inputs vary in length pass 32 at a time.
    """
    batch = learner.batch(shard, [0] * FEWEST_EXAMPLES)
    if not all(t.dim() >= 4 for t in batch.values()):  # pictures have four, their cached states more
        return MOST_EXAMPLES
    shapes = tuple(t.shape[1:] for t in batch.values())
    if not _counted or _counted[0][0] is not learner or _counted[0][1] != shapes:
        _counted[:] = [(learner, shapes, _numbers_made(learner, batch))]
    return min(MOST_EXAMPLES, max(FEWEST_EXAMPLES, MOST_NUMBERS // _counted[0][2]))


def _numbers_made(learner: Learner, batch: Batch) -> int:
    """How many numbers the layers without layers of their own make of one of the batch's examples."""
    there, _ = on_device(learner, batch, torch.zeros(0))
    made = [0]

    def count(module: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
        if isinstance(outputs, torch.Tensor):
            made[0] += outputs.numel()

    layers = [m for m in learner.model.modules() if not any(True for _ in m.children())]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad(), global_stream(learner.job.seed, "dropout"):
            learner.model(there)
    finally:
        for handle in handles:
            handle.remove()
    return max(1, made[0] // FEWEST_EXAMPLES)
