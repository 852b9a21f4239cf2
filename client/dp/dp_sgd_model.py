"""Training under example-level privacy by per-example gradients: any model, one client at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.dp.adaptive_norms import SCALE, ClippingScales
from atoll.client.dp.dp_sgd import CLIP_ROUNDING_MARGIN, DpSgd
from atoll.client.dp.example_draws import example_numbers
from atoll.client.dp.ghost_norms import Passes, ghost_passes, zeros_like
from atoll.client.dp.ghost_norms_fit import refuse_without_ghost_norms
from atoll.client.dp.mixed_examples import refuse_mixed_examples, refuse_mixing_layers
from atoll.client.dp.per_example_gradients import PerExampleGradients, hooks_suffice, per_example_gradients
from atoll.client.dp.private_examples import PrivateExamples, on_device
from atoll.client.training.learning_rates import StepRates
from atoll.client.training.local_sgd import add_proximal_gradient, optimizer_of
from atoll.client.training.optimizers import set_step
from atoll.data.shard import Shard
from atoll.learning import trainable
from atoll.learning.determinism import repeatable
from atoll.learning.learner import Learner
from atoll.privacy.noise import lattice_for
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors

_in_use: list[tuple[Learner, bool]] = []
"""The learner in use, and whether Opacus' hooks can take its gradients."""


def train_privately(
    learner: Learner,
    tensors: Tensors,
    shard: Shard,
    private: DpSgd,
    *,
    client: str,
    round: int,
    plan: Mapping[str, float],
) -> Update:
    """The update of one client after DP-SGD: its tensors after training minus the global `tensors`.

    Raises:
        ConfigError: a layer mixes the examples of a batch, so that none has a gradient of its own.
    """
    job, mu = learner.job, plan.get("proximal_mu", 0.0)
    model = learner.model
    learner.keep_states(shard)
    parameters = trainable.trainable(model)
    start = trainable.to_parameters(parameters, tensors)
    trainable.load_values(model, tensors)
    trainable.training_mode(model)
    assert private.draw is not None
    numbers = example_numbers(shard.keys)
    drawn = private.draw(client, numbers)
    rates = StepRates.of(job, round, [len(drawn)], "cpu")
    optimizer = optimizer_of(model, job, rates)
    noise = _Noise(private, client, parameters)
    scales = None
    if private.adaptive is not None:
        scales = ClippingScales(private.adaptive, [client], len(drawn))
    with repeatable(job.train.device), clipped_sums(learner, shard) as summed:
        for number, rows in enumerate(drawn):
            examples = PrivateExamples(learner, shard, numbers, (round, client, number))
            total = summed(examples, rows, private, scales)
            for name, gradient in noise.added(total).items():
                scaled = gradient if scales is None else gradient * scales.now[0]
                parameters[name].grad = scaled.to(parameters[name])
            if scales is not None:
                scales.follow(number)
            if mu:
                add_proximal_gradient(parameters, start, mu)
            set_step(optimizer, rates.factor(number))
            optimizer.step()
            if job.backbone.prune is not None:
                trainable.keep_pruned(model)
    public = private.public_fields([client])
    if scales is not None:
        public[1][SCALE] = torch.tensor(scales.now, dtype=torch.float64)
    return Update(
        client=client,
        round=round,
        delta=trainable.delta(parameters, start),
        num_examples=public[0][0],
        states={name: state[0] for name, state in public[1].items()},
    )


ClippedSum = Callable[[PrivateExamples, NDArray[np.int64], DpSgd, ClippingScales | None], Tensors]
"""(examples, rows, their protection, scales) to the rows' clipped gradients over the divisor, summed."""


@contextmanager
def clipped_sums(learner: Learner, shard: Shard) -> Iterator[ClippedSum]:
    """A context that yields a function for clipped sums, by gradients or by ghost norms as the job says.

    Raises:
        ConfigError: a layer mixes the examples of a batch, or ghost norms can't be had.
    """
    hooks = hooks_suffice_for(learner, shard)
    loss = learner.objective.loss(shard)
    if learner.job.privacy.ghost_norms:
        with ghost_passes(learner.model, loss) as passes:
            yield partial(ghost_clipped_sum, passes)
        return
    with per_example_gradients(learner.model, loss, hooks=hooks) as gradients:
        yield partial(clipped_sum, gradients)


def clipped_sum(
    gradients: PerExampleGradients,
    examples: PrivateExamples,
    rows: NDArray[np.int64],
    private: DpSgd,
    scales: ClippingScales | None = None,
) -> Tensors:
    """The sum of these rows' clipped gradients over the divisor, by name, in float64; zeros for no rows.

    With `scales`, of the client alone, gradients over its scale are clipped, and those within are counted.
    """
    scale = 1.0 if scales is None else scales.now[0]
    within: list[torch.Tensor] = []
    total = {
        name: torch.zeros(value.shape, dtype=torch.float64)
        for name, value in trainable.trainable(examples.learner.model).items()
    }
    for part in _parts(examples, rows):
        each = examples.gradients_of(gradients, part)
        clipped = _clipped(each, private, scale)
        within.append(clipped >= 1)
        factor = clipped / (scale * private.divisor)
        for name, g in each.items():
            sound = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
            total[name] += torch.tensordot(factor.to(g.dtype), sound, dims=1).cpu().to(torch.float64)
    _count(scales, within, rows)
    return total


def ghost_clipped_sum(
    passes: Passes,
    examples: PrivateExamples,
    rows: NDArray[np.int64],
    private: DpSgd,
    scales: ClippingScales | None = None,
) -> Tensors:
    """As `clipped_sum`, by norms and sums that lay out no gradient of a large layer."""
    scale = 1.0 if scales is None else scales.now[0]
    within: list[torch.Tensor] = []
    total = zeros_like(trainable.trainable(examples.learner.model))
    for part in _parts(examples, rows):
        passed = examples.passed(passes, part)
        clipped = _clipped_norms(passed.squared_norms().sqrt(), private, scale)
        clipped[len(part) :] = 0
        within.append(clipped[: len(part)] >= 1)
        passed.add_to(total, clipped / (scale * private.divisor))
    _count(scales, within, rows)
    return {name: t.cpu() for name, t in total.items()}


def _parts(examples: PrivateExamples, rows: NDArray[np.int64]) -> Iterator[list[int]]:
    """The rows in parts whose gradients fit into memory together."""
    together = examples.together if len(rows) else 1
    for begin in range(0, len(rows), together):
        yield rows[begin : begin + together].tolist()


def _count(scales: ClippingScales | None, within: list[torch.Tensor], rows: NDArray[np.int64]) -> None:
    """Note, where norms are adapted, which of the drawn examples were within the norm."""
    if scales is not None:
        counted = torch.cat([torch.zeros(0, dtype=torch.bool), *[part.cpu() for part in within]])
        scales.count(counted.unsqueeze(0), torch.ones(1, len(rows), dtype=torch.bool))


def _clipped(each: Mapping[str, torch.Tensor], private: DpSgd, scale: float) -> torch.Tensor:
    """The factor that clips each example's gradient over all tensors together, [batch]."""
    squares = [g.flatten(1).to(torch.float64).square().sum(1) for g in each.values()]
    return _clipped_norms(torch.stack(squares).sum(0).sqrt(), private, scale)


def _clipped_norms(norms: torch.Tensor, private: DpSgd, scale: float) -> torch.Tensor:
    """The factor that clips each example's gradient of this norm, [batch]; 1 for those within.

    The norm of a gradient is that of all tensors together, over `scale`; one that isn't finite gets 0.
    """
    norm = norms / scale
    clipped = (private.clipping_norm * CLIP_ROUNDING_MARGIN / norm.clamp_min(1e-12)).clamp_max(1.0)
    return clipped.masked_fill(~torch.isfinite(norm), 0.0)


class _Noise:
    """The client's noise for step after step, drawn over all tensors in the order of their names."""

    def __init__(self, private: DpSgd, client: str, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self.names = sorted(parameters)
        self.sizes = [parameters[name].numel() for name in self.names]
        self.lattice = lattice_for(
            private.noise_multiplier,
            private.clipping_norm / private.divisor,
            sum(self.sizes),
            private.random_bits(client),
        )

    def added(self, total: Tensors) -> Tensors:
        flat = torch.cat([total[name].reshape(-1) for name in self.names]).numpy()
        parts = torch.split(torch.from_numpy(self.lattice.added(flat)), self.sizes)
        return {name: part.reshape(total[name].shape) for name, part in zip(self.names, parts, strict=True)}


def hooks_suffice_for(learner: Learner, shard: Shard) -> bool:
    """Whether Opacus' hooks can compute the learner's per-example gradients; tested once for each learner.

    For a shard without examples it is False, without a test; the next shard is tested then.

    Raises:
        ConfigError: a layer mixes the examples of a batch, or the job's ghost norms can't be had.
    """
    if not len(shard):
        return False
    if not _in_use or _in_use[0][0] is not learner:
        rows = [0, min(1, len(shard) - 1)]
        batch, targets = on_device(learner, learner.batch(shard, rows), shard.targets_of(rows))
        loss = learner.objective.loss(shard)
        refuse_mixing_layers(learner, batch)
        if learner.job.privacy.ghost_norms:
            refuse_without_ghost_norms(learner, shard)
            hooks = True
        else:
            with global_stream(learner.job.seed, "dropout"):
                hooks = hooks_suffice(learner.model, loss, batch, targets)
        refuse_mixed_examples(learner, shard, hooks=hooks)
        _in_use[:] = [(learner, hooks)]
    return _in_use[0][1]


def model_sums(
    learner: Learner, tensors: Tensors, shards: Mapping[str, Shard], private: DpSgd, round: int
) -> Iterator[tuple[str, Tensors]]:
    """(client, the sum of clipped gradients over its Poisson batch) by client; zeros for an empty batch."""
    model = learner.model
    trainable.load_values(model, tensors)
    trainable.training_mode(model)
    assert private.draw is not None
    for client, shard in shards.items():
        numbers = example_numbers(shard.keys)
        rows = private.draw(client, numbers)[0]
        examples = PrivateExamples(learner, shard, numbers, (round, client, 0))
        with repeatable(learner.job.train.device), clipped_sums(learner, shard) as summed:
            total = summed(examples, rows, private, None)
        yield client, total
