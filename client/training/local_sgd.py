"""Local training by autograd: one client after the other, the loop written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from atoll.backbones.brought.names import brought_augmentations
from atoll.backbones.encoder import Batch, Model, Variation
from atoll.client.training.activation_checkpointing import activation_checkpointing
from atoll.client.training.apfl import SharedBeside
from atoll.client.training.batches import batches
from atoll.client.training.factored_sgd import outer_product_sgd
from atoll.client.training.learning_rates import StepRates, groups_of, layer_rates
from atoll.client.training.moon import ModelContrast
from atoll.client.training.optimizers import set_step, torch_optimizer
from atoll.client.training.per_fedavg import Backward, gradient_after_a_step
from atoll.client.training.pfedme import MoreauSteps, envelope_gradient
from atoll.client.training.precision import autocast, scaler_of, to_float32
from atoll.client.training.zeroth_order import BatchLoss, step_along_directions
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.determinism import repeatable
from atoll.learning.learner import Learner
from atoll.learning.objective.local_objective import TrainingLoss
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import global_stream, stream
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class _Terms:
    """What changes every gradient: the proximal term mu (w - start), a correction, and a norm to clip to.

    Where `only` is given, all other tensors keep their values.
    """

    start: Tensors
    mu: float
    correction: Tensors
    clip_norm: float | None
    only: Set[str] | None


def train_model(
    learner: Learner,
    tensors: Tensors,
    shard: Shard,
    job: Job,
    *,
    client: str,
    round: int,
    plan: Mapping[str, float],
    begin: Tensors | None = None,
    correction: Tensors | None = None,
    steps: int | None = None,
    inner_lr: float = 0.0,
    mixing: float = 0.0,
    moreau: MoreauSteps | None = None,
    contrast: ModelContrast | None = None,
    only: Set[str] | None = None,
) -> Update:
    """The update of one client after local training: its tensors after training minus the global `tensors`.

    Training starts from `tensors` or `begin`; the plan's `proximal_mu` pulls towards `tensors`. `correction`
    is added to every gradient. It takes `steps` local steps (None: the job's); only tensors in `only` move.
    At most one method is used: `inner_lr` takes gradients one step ahead (Per-FedAvg), `mixing` of a mixture
    with the global model (APFL), `moreau` of the Moreau envelope (pFedMe); `contrast` adds a term (MOON).
    """
    if job.tune.method == "seeds":
        return _train_by_seeds(learner, tensors, shard, job, client, round, plan, steps)
    mu, model, parameters = plan.get("proximal_mu", 0.0), learner.model, trainable.trainable(learner.model)
    start = trainable.to_parameters(parameters, tensors)
    _begin(learner, shard, {**tensors, **(begin or {})})
    schedule, rates = _schedule(learner, shard, job, client, round, steps)
    optimizer = optimizer_of(model, job, rates)
    added = trainable.to_parameters(parameters, correction) if correction is not None else {}
    terms = _Terms(start, mu, added, job.train.clip_norm, only)
    summed, loss_of, scaler = 0.0, learner.objective.loss(shard), scaler_of(job.train)

    def backward(number: int) -> Iterator[float]:
        optimizer.zero_grad()
        varied = variation(job, round, client, number)
        return _add_gradient(learner, shard, schedule[number], job, varied, loss_of, scaler, contrast)

    beside = SharedBeside(model, start, job, rates, mixing) if mixing else None
    take = _gradients_by(backward, parameters, len(schedule), inner_lr, moreau, beside)
    has_terms = bool(mu or added or inner_lr or mixing or moreau or contrast or only)
    with (
        global_stream(job.seed, "dropout", round, client),
        _memory_saved(model, job),
        repeatable(job.train.device),
        outer_product_sgd(model, job, has_terms=has_terms) as factors,
    ):
        for number in range(len(schedule)):
            for loss in take(number):
                summed += loss
            _take_step(optimizer, scaler, parameters, terms, rates.factor(number))
            for weight in factors:
                weight.step(rates.lr)
            if job.backbone.prune is not None:
                trainable.keep_pruned(model)
    optimizer.zero_grad()  # gradients take as much memory as the trained tensors, until the next round
    return Update(client, round, trainable.delta(parameters, start), len(shard), _losses(summed, shard, job))


def _schedule(
    learner: Learner, shard: Shard, job: Job, client: str, round: int, steps: int | None
) -> tuple[list[list[int]], StepRates]:
    """(the rows of each local step's batch, at most `steps` of them; the steps' learning rates)."""
    schedule = batches(len(shard), job, round, client, learner.objective.chances(shard))[:steps]
    return schedule, StepRates.of(job, round, [len(schedule)], "cpu")


def _train_by_seeds(
    learner: Learner,
    tensors: Tensors,
    shard: Shard,
    job: Job,
    client: str,
    round: int,
    plan: Mapping[str, float],
    steps: int | None,
) -> Update:
    """Train the coefficients of random directions by loss values alone (FedKSeed), without dropout.

    The job's rules exclude other starts, corrections and contrasts for this method.

    Raises:
        ConfigError: the strategy asks for a proximal term.
    """
    if plan.get("proximal_mu"):
        raise ConfigError("strategy.name: tune.method = 'seeds' has no proximal term; expected another")
    model, parameters = learner.model.eval(), trainable.trainable(learner.model)
    start = trainable.to_parameters(parameters, tensors)
    trainable.load_values(model, tensors)
    schedule, rates = _schedule(learner, shard, job, client, round, steps)
    training_loss = learner.objective.loss(shard)

    def loss_of(step: int) -> BatchLoss:
        varied = variation(job, round, client, step)
        return _batch_loss(learner, shard, schedule[step], job, varied, training_loss)

    with repeatable(job.train.device):
        losses = step_along_directions(
            model, job, rates, loss_of, client=client, round=round, steps=len(schedule)
        )
    summed = sum(loss * len(rows) for loss, rows in zip(losses, schedule, strict=True))
    return Update(client, round, trainable.delta(parameters, start), len(shard), _losses(summed, shard, job))


def _batch_loss(
    learner: Learner,
    shard: Shard,
    rows: Sequence[int],
    job: Job,
    varied: Variation | None,
    loss_of: TrainingLoss,
) -> BatchLoss:
    """A function that returns a batch's loss with the model's weights at the time of the call."""
    parts = list(_parts_on_device(learner, shard, rows, job, varied))

    def loss() -> float:
        total = 0.0
        for batch, targets, share in parts:
            with autocast(job.train):
                outputs = learner.model(batch)
            total += share * float(loss_of(to_float32(outputs), targets))
        return total

    return loss


def _gradients_by(
    backward: Backward,
    parameters: Mapping[str, torch.nn.Parameter],
    steps: int,
    inner_lr: float,
    moreau: MoreauSteps | None,
    beside: SharedBeside | None,
) -> Backward:
    """A function that leaves a batch's gradient in the network: the plain one, or that of a method."""
    if inner_lr:
        return partial(gradient_after_a_step, parameters, inner_lr, steps, backward)
    if moreau is not None:
        return partial(envelope_gradient, parameters, moreau, backward)
    return backward if beside is None else partial(beside.step, backward)


def _begin(learner: Learner, shard: Shard, tensors: Tensors) -> None:
    """Cache the states of the shard where the job does, then load the tensors into the model for training."""
    learner.keep_states(shard)
    trainable.load_values(learner.model, tensors)
    trainable.training_mode(learner.model)


def _add_gradient(
    learner: Learner,
    shard: Shard,
    rows: Sequence[int],
    job: Job,
    varied: Variation | None,
    loss_of: TrainingLoss,
    scaler: torch.amp.GradScaler,
    contrast: ModelContrast | None,
) -> Iterator[float]:
    """Add a batch's gradient, part by part, to what the parameters hold; each part's summed loss.

    The losses exclude the `contrast`.
    """
    for batch, targets, share in _parts_on_device(learner, shard, rows, job, varied):
        with autocast(job.train):
            if contrast is None:
                outputs, apart = learner.model(batch), None
            else:
                outputs, apart = contrast.outputs(learner.model, batch)
        loss = loss_of(to_float32(outputs), targets)
        total = loss if apart is None else loss + apart
        scaler.scale(total * share).backward()  # type: ignore[no-untyped-call]
        yield float(loss.detach()) * len(targets)


def optimizer_of(model: Model, job: Job, rates: StepRates) -> torch.optim.Optimizer:
    """A fresh optimizer of the tuned parameters, at the rates of the round and of their blocks."""
    groups = groups_of(trainable.trainable(model), layer_rates(model, job.train), rates.lr)
    return torch_optimizer(groups, job.train, rates.lr)


def _losses(summed: float, shard: Shard, job: Job) -> dict[str, torch.Tensor]:
    """The states of an update from which the server computes the mean training loss."""
    count = float(job.train.examples_seen(len(shard)))
    return {
        "train_loss.sum": torch.tensor(summed).double(),
        "train_loss.count": torch.tensor(count).double(),
    }


def parts_of(rows: Sequence[int], job: Job) -> list[Sequence[int]]:
    """A batch's rows in parts of batch_size / accumulate, of which the last one may be smaller.

    The loss is a mean, so a part's counts by its share of the batch (`Task.loss_weight`).
    """
    size = job.train.batch_size // job.train.accumulate
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def weighted_parts(
    learner: Learner, shard: Shard, rows: Sequence[int], job: Job
) -> Iterator[tuple[Sequence[int], float]]:
    """The parts of a batch, each with its share of the batch's loss."""
    parts = parts_of(rows, job)
    if len(parts) == 1:
        yield rows, 1.0
        return
    weights = [learner.task.loss_weight(shard, part) for part in parts]
    for part, weight in zip(parts, weights, strict=True):
        yield part, weight / (sum(weights) or 1.0)


def _parts_on_device(
    learner: Learner, shard: Shard, rows: Sequence[int], job: Job, varied: Variation | None
) -> Iterator[tuple[Batch, torch.Tensor, float]]:
    """(inputs, targets, share of the loss) of each part of a batch, where the model is."""
    device = job.train.device
    for part, share in weighted_parts(learner, shard, rows, job):
        batch = {name: t.to(device) for name, t in learner.batch(shard, part, varied).items()}
        yield batch, shard.targets_of(part).to(device), share


def _memory_saved(model: Model, job: Job) -> AbstractContextManager[None]:
    return activation_checkpointing(model) if job.train.checkpoint_activations else nullcontext()


def variation(job: Job, round: int, client: str, number: int) -> Variation | None:
    """How the inputs of a batch are augmented; None where the job augments nothing."""
    if not job.train.augment:
        return None
    draw = stream(job.seed, "augment", round, client, number)
    return Variation(job.train.augment, lambda place: draw, brought_augmentations(job))


def _take_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Mapping[str, torch.nn.Parameter],
    terms: _Terms,
    factor: float,
) -> None:
    """Take one optimizer step with the changed gradients, at `factor` times the round's learning rate."""
    if terms.only is not None:
        for name in parameters.keys() - terms.only:
            parameters[name].grad = None  # an optimizer passes over it
    if terms.mu or terms.correction or terms.clip_norm is not None:
        scaler.unscale_(optimizer)
        add_proximal_gradient(parameters, terms.start, terms.mu)
        add_correction(parameters, terms.correction)
        clip_gradient(parameters, terms.clip_norm)
    set_step(optimizer, factor)
    scaler.step(optimizer)
    scaler.update()


def add_proximal_gradient(parameters: Mapping[str, torch.nn.Parameter], start: Tensors, mu: float) -> None:
    """Add mu (w - w_global), the gradient of FedProx's term (Li et al. 2020), unless mu is 0."""
    for name, p in parameters.items() if mu else ():
        if p.grad is not None:
            p.grad += mu * (p.detach() - start[name])


def add_correction(parameters: Mapping[str, torch.nn.Parameter], correction: Tensors) -> None:
    """Add a method's correction to the gradients of the parameters that have one."""
    for name, values in correction.items():
        grad = parameters[name].grad
        if grad is not None:
            grad += values


def clip_gradient(parameters: Mapping[str, torch.nn.Parameter], clip_norm: float | None) -> None:
    """Scale all gradients together so that their L2 norm is `clip_norm` at most (Pascanu et al. 2013)."""
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip_norm)
