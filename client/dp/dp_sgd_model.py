"""Training under example-level privacy by per-example gradients: any model, one client at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.dp.adaptive_norms import SCALE, ClippingScales
from atoll.client.dp.dp_sgd import CLIP_ROUNDING_MARGIN, DpSgd
from atoll.client.dp.example_draws import example_numbers
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

EXAMPLES_PER_GRADIENT_BATCH = 32
"""How many examples' gradients are in memory together; noise is added once per step, after all parts."""

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
    hooks = hooks_suffice_for(learner, shard)
    noise = _Noise(private, client, parameters)
    scales = None
    if private.adaptive is not None:
        scales = ClippingScales(private.adaptive, [client], len(drawn))
    with (
        repeatable(job.train.device),
        per_example_gradients(model, learner.objective.loss(shard), hooks=hooks) as gradients,
    ):
        for number, rows in enumerate(drawn):
            examples = PrivateExamples(learner, shard, numbers, (round, client, number))
            total = clipped_sum(gradients, examples, rows, private, scales)
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
    for begin in range(0, len(rows), EXAMPLES_PER_GRADIENT_BATCH):
        each = examples.gradients_of(gradients, rows[begin : begin + EXAMPLES_PER_GRADIENT_BATCH].tolist())
        clipped = _clipped(each, private, scale)
        within.append(clipped >= 1)
        factor = clipped / (scale * private.divisor)
        for name, g in each.items():
            sound = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
            total[name] += torch.tensordot(factor.to(g.dtype), sound, dims=1).cpu().to(torch.float64)
    if scales is not None:
        counted = torch.cat([torch.zeros(0, dtype=torch.bool), *[part.cpu() for part in within]])
        scales.count(counted.unsqueeze(0), torch.ones(1, len(rows), dtype=torch.bool))
    return total


def _clipped(each: Mapping[str, torch.Tensor], private: DpSgd, scale: float) -> torch.Tensor:
    """The factor that clips each example's gradient over all tensors together, [batch]; 1 for those within.

    The norm of a gradient is that of all tensors together, over `scale`; one that isn't finite gets 0.
    """
    squares = [g.flatten(1).to(torch.float64).square().sum(1) for g in each.values()]
    norm = torch.stack(squares).sum(0).sqrt() / scale
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
        ConfigError: a layer mixes the examples of a batch.
    """
    if not len(shard):
        return False
    if not _in_use or _in_use[0][0] is not learner:
        rows = [0, min(1, len(shard) - 1)]
        batch, targets = on_device(learner, learner.batch(shard, rows), shard.targets_of(rows))
        loss = learner.objective.loss(shard)
        refuse_mixing_layers(learner, batch)
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
        hooks = hooks_suffice_for(learner, shard)
        numbers = example_numbers(shard.keys)
        rows = private.draw(client, numbers)[0]
        examples = PrivateExamples(learner, shard, numbers, (round, client, 0))
        with (
            repeatable(learner.job.train.device),
            per_example_gradients(model, learner.objective.loss(shard), hooks=hooks) as gradients,
        ):
            total = clipped_sum(gradients, examples, rows, private)
        yield client, total
