"""Refuses networks whose ghost norms Opacus' hooks can't compute, before the first private step.

Two of a client's examples pass once, and what would be clipped is compared with what torch's own gradients
are for the same random draws: parameters that no hook sees, or sees in part, would be clipped wrongly.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import torch

from atoll.backbones.encoder import Batch, Model
from atoll.client.dp.example_draws import example_numbers
from atoll.client.dp.ghost_norms import OtherRows, PassedBatch, ghost_passes
from atoll.client.dp.per_example_gradients import Loss
from atoll.client.dp.private_examples import passed_batch
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.learning import trainable
from atoll.learning.determinism import repeatable
from atoll.learning.learner import Learner
from atoll.protocol.tensors import Tensors

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""The relative difference that the batch's gradient may have, by float32 rounding."""

NORM_TOLERANCE = 1e-5
"""The relative difference between a ghost norm and the norm of what is summed."""


def refuse_without_ghost_norms(learner: Learner, shard: Shard) -> None:
    """Raises ConfigError, in one line, where the model's ghost norms can't be had, or are wrong.

    The line goes to the server, so it has no number and no shape, which depend on the examples; a site's log
    has what torch or Opacus said.
    """
    try:
        fault = _fault(learner, shard)
    except torch.OutOfMemoryError:
        raise
    except (OtherRows, NotImplementedError) as error:  # of layers, whatever passes through them
        fault = str(error).partition("\n")[0] or type(error).__name__
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("ghost norms: %s", error)
        fault = f"a layer failed: {type(error).__name__}"
    if fault is not None:
        raise ConfigError(
            f"privacy.ghost_norms: hooks can't tell examples apart in {learner.backbone.name} with"
            f" tune.method = {learner.job.tune.method!r} ({fault}); expected ghost_norms = false, or another"
            " way of tuning"
        )


def _fault(learner: Learner, shard: Shard) -> str | None:
    """What is wrong with the ghost norms of two examples; None if nothing is."""
    rows = [0, min(1, len(shard) - 1)]
    numbers = example_numbers([row.to_bytes(32, "little") for row in range(len(rows))])
    batch, targets, step = learner.batch(shard, rows), shard.targets_of(rows), (0, "", 0)
    loss = learner.objective.loss(shard)
    with repeatable(learner.job.train.device):
        with ghost_passes(learner.model, loss) as passes:
            passed = passed_batch(learner, passes, batch, targets, numbers, step)
        plain = partial(_plain_gradient, learner.model, loss)
        expected = passed_batch(learner, plain, batch, targets, numbers, step)
        return _wrong_sum(passed, expected, len(rows))


def _plain_gradient(model: Model, loss: Loss, batch: Batch, targets: torch.Tensor) -> Tensors:
    """The gradient of the sum of the examples' losses, without the parameters that it doesn't depend on."""
    parameters = trainable.trainable(model)
    with torch.enable_grad():
        value = loss(model(batch), targets) * len(targets)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def _wrong_sum(passed: PassedBatch, expected: Tensors, size: int) -> str | None:
    """Which parameter's gradients don't add up to the batch's, or which norm is another one; None if none.

    What isn't finite counts as zero in every sum, whatever its norm.
    """
    for name in expected:
        if name not in passed.terms:
            return f"{name} is used where no hook sees it"
    ghost = passed.squared_norms().sqrt().tolist()
    lengths = dict.fromkeys(passed.terms, 0.0)
    for row, only in enumerate(torch.eye(size, dtype=torch.float64)):
        norms = {name: float(gradient.norm()) for name, gradient in passed.sum_of(only).items()}
        norm = math.hypot(*norms.values())
        if not math.isfinite(norm) or not math.isfinite(ghost[row]):
            return None
        if abs(ghost[row] - norm) > NORM_TOLERANCE * norm:
            return "a norm isn't that of what is summed"
        lengths = {name: length + norms[name] for name, length in lengths.items()}
    total = passed.sum_of(torch.ones(size, dtype=torch.float64))
    for name, gradient in expected.items():
        apart, length = float((total[name] - gradient).norm()), lengths[name] + float(gradient.norm())
        if apart > TOLERANCE * (length + TOLERANCE * sum(ghost)):
            return f"the gradients of {name} don't add up to the batch's"
    return None
