"""Trains heads on features for a whole cohort together; a single real client is a cohort of one.

Every local step is a few batched matrix products with the gradient in closed form (`client/heads/layers.py`).
A client's numbers have the same bits whoever else is in the cohort: the shape of its slice depends on that
client alone, since batches are padded to a size of its own, and element-wise steps are single operations,
never fused ones. This has been observed with one thread; the number of threads is fixed by the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.dp.adaptive_norms import SCALE, ClippingScales
from atoll.client.dp.dp_sgd import DpSgd, StackedNoise, clip_factors, stacked_noise
from atoll.client.dp.example_draws import example_views
from atoll.client.heads.class_imbalance import balanced, smoothed
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import Layers, Loss, Stack, gradients, padded, sgd_step_
from atoll.client.training.batches import (
    epoch_seeds,
    fill_schedule,
    permutations,
    sample_views,
    weighted_sample,
)
from atoll.client.training.learning_rates import StepRates
from atoll.client.training.local_steps import examples_seen
from atoll.client.training.optimizers import clip_stacked, is_plain, make_optimizer
from atoll.client.training.per_fedavg import adapted_heads, inner_batches
from atoll.client.training.pfedme import Gradients, MoreauSteps, envelope_gradients
from atoll.job.job import Job
from atoll.learning.determinism import is_gpu
from atoll.learning.objective.class_imbalance import Imbalance, counts_of
from atoll.protocol.stacked_updates import StackedUpdates, joined
from atoll.protocol.tensors import Tensors


@dataclass(frozen=True)
class HeadTrainingConfig:
    """How every client of a round trains its head: the job's `[train]` and what the round adds.

    `corrections` are added to the gradients of the clients that have one, shaped as the head (SCAFFOLD's
    c - c_i, FedDyn's -g_k). With `starts`, for all clients or none, each starts from its own head; updates
    and the proximal term stay relative to the shared head. `steps` limits the number of local steps. At most
    one method changes the gradient: `inner_lr` takes it one step ahead (Per-FedAvg), `mixing` takes it of a
    mixture with the shared head, which trains beside (APFL), `moreau` of the loss's Moreau envelope (pFedMe).
    """

    job: Job
    loss: Loss
    round: int
    proximal_mu: float = 0.0
    per_example: DpSgd | None = None
    corrections: Mapping[str, Tensors] = field(default_factory=dict)
    starts: Mapping[str, Tensors] = field(default_factory=dict)
    steps: int | None = None
    inner_lr: float = 0.0
    mixing: float = 0.0
    moreau: MoreauSteps | None = None


def train_heads(
    head: Tensors, examples: FeatureTable, client_rows: Sequence[ClientRows], local: HeadTrainingConfig
) -> StackedUpdates:
    """The clients' updates after local training from one `head`, in the order of `client_rows`.

    The head is one linear layer (`head.weight` [outputs, width], `head.bias`) or several with a ReLU
    between any two (`head.0.weight`, `head.0.bias`, `head.2.weight`, …). Each client trains on its rows of
    `examples`.
    """
    groups: dict[tuple[int, int], list[ClientRows]] = {}
    on_gpu = is_gpu(local.job.train.device)
    for work in (with_poisson_batches(work, local.per_example) for work in client_rows):
        steps = _steps(work, local) if on_gpu else 0
        groups.setdefault((_rows_per_batch(work, local), steps), []).append(work)
    parts = []
    for (size, _), group in groups.items():
        count = min(_clients_per_block(head, size), GPU_BLOCK) if on_gpu else _clients_per_block(head, size)
        for start in range(0, len(group), count):
            block = group[start : start + count]
            whole = block + block[-1:] * (count - len(block)) if on_gpu else block
            trained = _train_group(head, examples, whole, size, local)
            parts.append(trained.of_clients([work.client for work in block]) if on_gpu else trained)
    return joined(parts).of_clients([work.client for work in client_rows])


GPU_BLOCK = 64
"""Clients per block on a GPU, always filled up: how cuBLAS sums depends on the number of products."""

CACHE_NUMBERS = 1 << 20
"""How many numbers a block of clients works on at a time; more do not stay in a core's cache."""


def _clients_per_block(head: Tensors, size: int) -> int:
    """How many clients form a block, given the size of one client's head and of one batch's inputs."""
    widths = [padded(layer.inputs) * (layer.outputs + size) for layer in Layers.of(head).layers]
    return max(1, CACHE_NUMBERS // sum(widths))


def with_poisson_batches(work: ClientRows, private: DpSgd | None) -> ClientRows:
    """The client's rows with their Poisson batches, where example-level privacy needs these."""
    if private is None or private.draw is None:
        return work
    assert work.numbers is not None, "under example-level privacy every draw belongs to an example"
    return replace(work, batches=tuple(private.draw(work.client, work.numbers)))


def _steps(work: ClientRows, local: HeadTrainingConfig) -> int:
    """How many local steps a client takes."""
    train = local.job.train
    return len(work.batches) or train.local_steps(len(work.rows))


def _rows_per_batch(work: ClientRows, local: HeadTrainingConfig) -> int:
    if work.batches:
        # Coins draw a different number for everybody: to a power of two, so that many are of one size.
        most = max(len(batch) for batch in work.batches)
        return rows_per_batch(most, batch_size=2 * most)
    return rows_per_batch(len(work.rows), local.job.train.batch_size)


def rows_per_batch(count: int, batch_size: int) -> int:
    """Rows a batch is padded to: at least two, and a power of two where the shard is smaller."""
    fitting: int = 1 << max(count - 1, 1).bit_length()
    return max(2, min(batch_size, fitting))


@dataclass(frozen=True)
class _Schedule:
    """The rows of each client's steps; clients with the most steps come first.

    The clients that still train at a step are then a prefix. `rows` [steps, clients, batch] are row numbers
    of the feature table, with the client's first row as padding. `share` is 1 / batch size, or 0 for padding.
    `steps` is each client's number of steps.
    """

    client_rows: list[ClientRows]
    rows: torch.Tensor
    share: torch.Tensor
    steps: list[int]

    @cached_property
    def active(self) -> list[int]:
        """How many clients still train at each step."""
        return [sum(steps > s for steps in self.steps) for s in range(len(self.rows))]

    def first(self, most: int | None) -> _Schedule:
        """The schedule's first steps, or all of them."""
        if most is None:
            return self
        steps = [min(count, most) for count in self.steps]
        return replace(self, rows=self.rows[:most], share=self.share[:most], steps=steps)


def _train_group(
    head: Tensors, examples: FeatureTable, client_rows: list[ClientRows], size: int, local: HeadTrainingConfig
) -> StackedUpdates:
    job = local.job
    layers = Layers.of(head)
    schedule = _schedule(client_rows, size, job, local.round, examples).first(local.steps)
    local = replace(local, loss=_loss(local, schedule, examples, head))
    start = layers.stack(head, job.train.device)
    now = [matrix.repeat(len(client_rows), 1, 1) for matrix in start]
    if local.starts:
        starts = [layers.stack(local.starts[work.client], job.train.device) for work in schedule.client_rows]
        now = [torch.cat(matrices) for matrices in zip(*starts, strict=True)]
    extra = _GradientTerms.of(layers, schedule, local, now[0].device)
    losses = _run_local_steps(layers, now, start, examples, schedule, extra)
    counts = tuple(len(work.rows) for work in schedule.client_rows)
    states = {
        "train_loss.sum": losses.cpu(),
        "train_loss.count": examples_seen(counts, job.train),
    }
    if local.per_example is not None:
        counts, states = local.per_example.public_fields([work.client for work in schedule.client_rows])
        if extra.scales is not None:
            states[SCALE] = torch.tensor(extra.scales.now, dtype=torch.float64)
    return StackedUpdates(
        clients=tuple(work.client for work in schedule.client_rows),
        round=local.round,
        delta=layers.unstack([matrix.sub_(first) for matrix, first in zip(now, start, strict=True)]),
        num_examples=counts,
        states=states,
    )


def _loss(local: HeadTrainingConfig, schedule: _Schedule, examples: FeatureTable, head: Tensors) -> Loss:
    """The loss of clients that train together, corrected for their class counts where the job says so."""
    imbalance = Imbalance.of(local.job)
    if imbalance is None or imbalance.kind == "sampling":
        return smoothed(local.loss, local.job)
    classes = Layers.of(head).layers[-1].outputs
    counts = [counts_of(examples.targets[torch.from_numpy(w.rows)], classes) for w in schedule.client_rows]
    return balanced(local.loss, imbalance, torch.stack(counts).to(examples.features.device))


def _schedule(
    client_rows: list[ClientRows], size: int, job: Job, round: int, examples: FeatureTable
) -> _Schedule:
    if client_rows[0].batches:
        return _drawn_schedule(client_rows, size, job, round, examples)
    client_rows = sorted(client_rows, key=lambda work: -len(work.rows))
    counts = np.array([len(work.rows) for work in client_rows])
    steps = [job.train.local_steps(len(work.rows)) for work in client_rows]
    epochs = max(job.train.epochs_begun(len(work.rows)) for work in client_rows)
    clients = [work.client for work in client_rows]
    table = np.zeros((len(client_rows), counts.max()), dtype=np.int64)
    for i, work in enumerate(client_rows):
        table[i, : counts[i]] = work.rows
    rows = np.repeat(table[:, :1, None], max(steps) * size, axis=2).reshape(
        len(client_rows), max(steps), size
    )
    share = np.zeros(rows.shape, dtype=np.float32)
    for epoch, seen in enumerate(_rows_seen(table, clients, examples, job, round, epochs)):
        order = _order(client_rows, examples, job, epoch_seeds(job, round, clients, epoch))
        shuffled = np.take_along_axis(seen, order, axis=1)
        fill_schedule(rows, share, shuffled, counts, min(job.train.batch_size, size), epoch)
    return _Schedule(
        client_rows,
        torch.from_numpy(rows.transpose(1, 0, 2).copy()).to(job.train.device),
        torch.from_numpy(share.transpose(1, 0, 2).copy()).to(job.train.device),
        steps,
    )


def _drawn_schedule(
    client_rows: list[ClientRows], size: int, job: Job, round: int, examples: FeatureTable
) -> _Schedule:
    """The schedule of Poisson batches; every example's `share` is 1: it is clipped and divided later."""
    steps = len(client_rows[0].batches)
    rows = np.empty((steps, len(client_rows), size), dtype=np.int64)
    share = np.zeros(rows.shape, dtype=np.float32)
    for i, work in enumerate(client_rows):
        rows[:, i] = work.first_row
        for s, batch in enumerate(work.batches):
            seen = work.rows[batch]
            if examples.views > 1:
                assert work.numbers is not None
                shown = example_views(work.numbers[batch], examples.views, job, (round, work.client, s))
                seen = seen + examples.count * shown
            rows[s, i, : len(batch)] = seen
            share[s, i, : len(batch)] = 1
    device = job.train.device
    return _Schedule(
        client_rows,
        torch.from_numpy(rows).to(device),
        torch.from_numpy(share).to(device),
        [steps] * len(client_rows),
    )


def _order(
    client_rows: Sequence[ClientRows], examples: FeatureTable, job: Job, seeds: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Each client's places among its rows in the order of an epoch, [clients, most rows]."""
    counts, imbalance = [len(work.rows) for work in client_rows], Imbalance.of(job)
    order = permutations(counts, seeds)
    if imbalance is not None and imbalance.kind == "sampling":
        for i, work in enumerate(client_rows):
            chances = imbalance.chances(examples.targets[torch.from_numpy(work.rows)].cpu())
            assert chances is not None
            order[i, : counts[i]] = weighted_sample(chances, seeds[i : i + 1])
    return order


def _rows_seen(
    table: NDArray[np.int64],
    clients: Sequence[str],
    examples: FeatureTable,
    job: Job,
    round: int,
    epochs: int,
) -> Iterator[NDArray[np.int64]]:
    """Each epoch's rows of every client, [clients, rows]: in views drawn from the client's stream."""
    for epoch in range(epochs):
        if examples.views > 1:
            seeds = epoch_seeds(job, round, clients, epoch, "view")
            yield table + examples.count * sample_views(examples.views, seeds, table.shape[1])
        else:
            yield table


def _run_local_steps(
    layers: Layers,
    now: Stack,
    start: Stack,
    examples: FeatureTable,
    schedule: _Schedule,
    extra: _GradientTerms,
) -> torch.Tensor:
    """Move `now` in place through all local steps; each client's summed loss, [clients]."""
    local = extra.local
    rates = StepRates.of(local.job, local.round, schedule.steps, str(now[0].device))
    is_simple = extra.is_none and is_plain(local.job.train)
    move = _plain_move(rates) if is_simple else _move(start, extra, now, rates)
    move_by = None if local.moreau is None else _move_by(start, extra, now, rates)
    beside: _SharedBeside | None = None
    if local.mixing:
        w = [matrix.repeat(len(schedule.steps), 1, 1) for matrix in start]
        moves_w = _plain_move(rates) if is_simple else _move(start, extra, w, rates)
        beside = _SharedBeside(layers, local, w, moves_w)
    count, clients, size = schedule.rows.shape
    targets = examples.targets[schedule.rows]
    losses = torch.zeros((count, clients, size), device=now[0].device)
    # Written to again and again: fresh memory of this size costs more than what is put there.
    room = examples.features.new_empty((clients, size, examples.features.shape[1]))
    for s in range(count):
        active = schedule.active[s]
        rows, share = schedule.rows[s, :active], schedule.share[s, :active]
        inputs = room[:active]
        torch.index_select(examples.features, 0, rows.flatten(), out=inputs.view(active * size, -1))
        stack = [matrix[:active] for matrix in now]
        at = _adapted(layers, stack, examples, schedule, s, local) if local.inner_lr else stack
        if local.moreau is not None and move_by is not None:
            gradients_by = _gradients_by(layers, local.loss, inputs, targets[s, :active], share)
            gradient, losses[s, :active] = envelope_gradients(stack, local.moreau, gradients_by)
            move_by(s, stack, gradient)
            continue
        if beside is not None:
            at = beside.mixture(s, stack, inputs, targets[s, :active], share)
        values = layers.forward(at, inputs)
        error, losses[s, :active] = local.loss.grad(values[-1], targets[s, :active])
        each = layers.output_gradients(at, values, error)
        factor = extra.factor(values, each, share).unsqueeze(2)
        factor = factor * local.mixing if local.mixing else factor
        move(s, stack, values, [e.mul_(factor) for e in each])
    visited = schedule.share > 0
    summed = (local.loss.value(losses) * visited).transpose(0, 1).reshape(clients, -1)
    return summed.sum(dim=1, dtype=torch.float64)


def _adapted(
    layers: Layers,
    stack: Stack,
    examples: FeatureTable,
    schedule: _Schedule,
    s: int,
    local: HeadTrainingConfig,
) -> Stack:
    """The heads at which step `s` takes gradients: one inner step ahead, on each client's previous batch."""
    device, active = schedule.rows.device, len(stack[0])
    before = torch.tensor(inner_batches(s, schedule.steps[:active]), device=device)
    clients = torch.arange(active, device=device)
    rows, share = schedule.rows[before, clients], schedule.share[before, clients]
    inputs, targets = examples.features[rows], examples.targets[rows]
    return adapted_heads(layers, stack, local.loss, inputs, targets, share, local.inner_lr)


Move = Callable[[int, Stack, Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
"""Takes one local step: (step, stack, each layer's inputs, output gradients times each example's factor)."""


def _plain_move(rates: StepRates) -> Move:
    def move(s: int, stack: Stack, values: Sequence[torch.Tensor], error: Sequence[torch.Tensor]) -> None:
        sgd_step_(stack, values, error, rates.lr)

    return move


def _move(start: Stack, extra: _GradientTerms, now: Stack, rates: StepRates) -> Move:
    sums = [torch.empty_like(matrix) for matrix in now]
    move_by = _move_by(start, extra, now, rates)

    def move(s: int, stack: Stack, values: Sequence[torch.Tensor], error: Sequence[torch.Tensor]) -> None:
        gradient = [matrix[: len(stack[0])] for matrix in sums]
        gradients(values, error, out=gradient)
        move_by(s, stack, gradient)

    return move


def _move_by(
    start: Stack, extra: _GradientTerms, now: Stack, rates: StepRates
) -> Callable[[int, Stack, Stack], None]:
    """A function (step, stack, gradients) that takes one optimizer step, and may overwrite the gradients."""
    train = extra.local.job.train
    step = [make_optimizer(train) for _ in now]

    def move(s: int, stack: Stack, gradient: Stack) -> None:
        extra.add(gradient, stack, start, s)
        clip_stacked(gradient, train.clip_norm)
        lr = rates.at(s, len(stack[0]))
        for place, matrix in enumerate(stack):
            step[place](matrix, gradient[place], lr)

    return move


def _gradients_by(
    layers: Layers, loss: Loss, inputs: torch.Tensor, targets: torch.Tensor, share: torch.Tensor
) -> Gradients:
    """Gradients of stacked heads by a batch [clients, batch, width] whose examples count by `share`."""

    def gradients_at(stack: Stack) -> tuple[Stack, torch.Tensor]:
        values = layers.forward(stack, inputs)
        error, losses = loss.grad(values[-1], targets)
        each = layers.output_gradients(stack, values, error)
        out = [torch.empty_like(matrix) for matrix in stack]
        gradients(values, [e.mul_(share.unsqueeze(2)) for e in each], out=out)
        return out, losses

    return gradients_at


@dataclass(frozen=True)
class _SharedBeside:
    """APFL's w_i of every client, which train beside v_i; `client/state/apfl.py` has the symbols."""

    layers: Layers
    local: HeadTrainingConfig
    w: Stack
    move: Move

    def mixture(
        self, s: int, stack: Stack, inputs: torch.Tensor, targets: torch.Tensor, share: torch.Tensor
    ) -> Stack:
        """alpha v_i + (1 - alpha) w_i of the clients that still train; then w_i takes its step."""
        alpha, w = self.local.mixing, [matrix[: len(share)] for matrix in self.w]
        mixed = [v * alpha + shared * (1 - alpha) for v, shared in zip(stack, w, strict=True)]
        values = self.layers.forward(w, inputs)
        error, _ = self.local.loss.grad(values[-1], targets)
        each = self.layers.output_gradients(w, values, error)
        self.move(s, w, values, [e.mul_(share.unsqueeze(2)) for e in each])
        return mixed


@dataclass(frozen=True)
class _GradientTerms:
    """The terms that a round adds to plain gradients: clipping and noise, the proximal term, corrections."""

    local: HeadTrainingConfig
    noise: list[list[StackedNoise]]
    corrections: Stack
    scales: ClippingScales | None = None

    @classmethod
    def of(
        cls, layers: Layers, schedule: _Schedule, local: HeadTrainingConfig, device: torch.device
    ) -> _GradientTerms:
        """Noise for every step, and each client's correction, zero for one that has none."""
        noise: list[list[StackedNoise]] = []
        scales = None
        if local.per_example is not None:
            if local.per_example.adaptive is not None:
                clients = [work.client for work in schedule.client_rows]
                scales = ClippingScales(local.per_example.adaptive, clients, len(schedule.rows))
            steps = [(work.client, s) for work, s in zip(schedule.client_rows, schedule.steps, strict=True)]
            noise = stacked_noise(layers, steps, local.per_example, str(device))
        if not local.corrections:
            return cls(local, noise, [], scales)
        nothing = {n: torch.zeros_like(t) for n, t in next(iter(local.corrections.values())).items()}
        factors = [
            layers.stack(local.corrections.get(w.client, nothing), str(device)) for w in schedule.client_rows
        ]
        return cls(local, noise, [torch.cat(parts) for parts in zip(*factors, strict=True)], scales)

    @property
    def is_none(self) -> bool:
        """Whether nothing is added to the gradient."""
        return not (self.noise or self.corrections or self.local.proximal_mu or self.scales is not None)

    def factor(
        self, values: Sequence[torch.Tensor], each: Sequence[torch.Tensor], share: torch.Tensor
    ) -> torch.Tensor:
        """The factor by which each example's gradient is multiplied, [clients, batch]."""
        private = self.local.per_example
        return share if private is None else clip_factors(values, each, share, private, self.scales)

    def add(self, gradient: Stack, stack: Stack, start: Stack, s: int) -> None:
        """Add the terms of step `s` to the gradients of the clients that still train."""
        for place, g in enumerate(gradient):
            if self.noise:
                g.copy_(self.noise[s][place].added(g))
            if self.scales is not None:
                g *= self.scales.column(g)
            if self.local.proximal_mu:
                g += (stack[place] - start[place]) * self.local.proximal_mu
            if self.corrections:
                g += self.corrections[place][: len(g)]
        if self.scales is not None:
            self.scales.follow(s)
