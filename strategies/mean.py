"""The mean of the clients' deltas, weighted by their numbers of examples.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", algorithm 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from atoll.errors import InconsistentUpdates
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import StackedUpdates, weighing
from atoll.protocol.tensors import Tensors


def weighted_mean(updates: Sequence[Update]) -> Tensors:
    """The mean of the deltas, weighted by example counts: names and shapes of the deltas, in float64.

    The sum runs over the updates in the order given, so the same updates in the same
    order give the same bits, whether they arrived one by one or trained as one cohort.

    Raises:
        InconsistentUpdates: there is no update, or none has an example.
    """
    weights, total = _example_weights(updates)
    return _weighted(updates, weights, total)


def moved_by_mean(model: Tensors, updates: Sequence[Update], lr: float) -> Tensors:
    """The model moved by `lr` times the weighted mean delta, in its own dtypes; float64 blocks save memory.

    Raises:
        InconsistentUpdates: there is no update, or none has an example.
    """
    weights, total = _example_weights(updates)
    if isinstance(updates, StackedUpdates):
        return {
            name: _added(p, lr * _of_stack(weights, updates.delta[name], total)) for name, p in model.items()
        }
    return {
        name: _moved_by_each(p, weights, [update.delta[name] for update in updates], total, lr)
        for name, p in model.items()
    }


def _example_weights(updates: Sequence[Update]) -> tuple[torch.Tensor, int]:
    """(the number of examples of each update, [clients] in float64; their sum)."""
    counts = example_counts(updates)
    total = sum(counts)
    if total == 0:
        raise InconsistentUpdates("no examples behind any update: nothing to average")
    return torch.tensor(counts, dtype=torch.float64), total


def weighted_sum(updates: Sequence[Update], weights: torch.Tensor) -> Tensors:
    """The sum of deltas, each times its entry in `weights` [clients], in float64 and in the order given.

    >>> [a, b] = [Update(name, 1, {"w": torch.tensor([3.0])}, 1) for name in "ab"]
    >>> weighted_sum([a, b], torch.tensor([0.5, 2.0]))
    {'w': tensor([7.5000], dtype=torch.float64)}
    """
    return _weighted(updates, weights.to(torch.float64), 1)


def _weighted(updates: Sequence[Update], weights: torch.Tensor, total: int) -> Tensors:
    names = updates.delta if isinstance(updates, StackedUpdates) else updates[0].delta
    return {name: _weighted_tensor(updates, name, weights, total) for name in names}


def _weighted_tensor(updates: Sequence[Update], name: str, weights: torch.Tensor, total: int) -> torch.Tensor:
    if isinstance(updates, StackedUpdates):
        return _of_stack(weights, updates.delta[name], total)
    return _of_each(weights, [update.delta[name] for update in updates], total)


def even_mean(updates: Sequence[Update]) -> Tensors:
    """The unweighted mean of the deltas, in float64."""
    return weighted_mean(evenly(updates))


def evenly(updates: Sequence[Update]) -> Sequence[Update]:
    """The updates with `num_examples` 1 each, for strategies that weight all clients equally."""
    return weighing(updates, [1] * len(updates))


def example_counts(updates: Sequence[Update]) -> Sequence[int]:
    """Each update's number of examples; stacked updates are not taken apart for it."""
    if isinstance(updates, StackedUpdates):
        return updates.num_examples
    return [update.num_examples for update in updates]


def sent_numbers(updates: Sequence[Update], name: str) -> dict[str, float]:
    """The number that each client sent as the state `name`, by client, in the updates' order.

    Raises:
        InconsistentUpdates: a client sent no such state.
    """
    if isinstance(updates, StackedUpdates) and name in updates.states:
        return dict(zip(updates.clients, updates.states[name].tolist(), strict=True))
    silent = [update.client for update in updates if name not in update.states]
    if silent:
        raise InconsistentUpdates(f"{silent[0]} sent no {name}, expected it from every client")
    return {update.client: float(update.states[name]) for update in updates}


def mean_losses(updates: Sequence[Update]) -> dict[str, float]:
    """Each client's mean training loss over its local steps, by client, in the updates' order.

    Raises:
        InconsistentUpdates: a client sent no loss.
    """
    sums, counts = sent_numbers(updates, "train_loss.sum"), sent_numbers(updates, "train_loss.count")
    return {name: total / counts[name] for name, total in sums.items()}


def delta_of(updates: Sequence[Update], place: int) -> Tensors:
    """The delta of the update at `place`; stacked updates are not taken apart for it."""
    if isinstance(updates, StackedUpdates):
        return {name: stack[place] for name, stack in updates.delta.items()}
    return updates[place].delta


def squared_norm(tensors: Tensors) -> float:
    """The squared L2 norm over all tensors, summed in float64 in the order of their names."""
    flat = (tensors[name].reshape(-1).to(torch.float64) for name in sorted(tensors))
    return sum(float(torch.linalg.vector_norm(values)) ** 2 for values in flat)


STACK_BLOCK = 1 << 16
"""How many values of a stack are summed in float64 at a time, so that they stay in the processor's cache."""
BLOCK = 1 << 20
"""The same for updates that are not stacked: 8 MB per thread. The bits depend on neither size."""


def _of_stack(weights: torch.Tensor, values: torch.Tensor, total: int) -> torch.Tensor:
    """Weighted sum over the first dimension, [clients, …] to […], over `total`, in float64."""
    parts = torch.split(values.reshape(len(values), -1), _columns(weights, STACK_BLOCK), dim=1)
    return torch.cat([weights @ part.to(torch.float64) for part in parts]).reshape(values.shape[1:]) / total


def _of_each(weights: torch.Tensor, values: Sequence[torch.Tensor], total: int) -> torch.Tensor:
    """The same for one tensor per client, which are not stacked."""
    mean = torch.empty(values[0].numel(), dtype=torch.float64)
    _with_blocks_of_mean(weights, values, total, mean.__setitem__)
    return mean.reshape(values[0].shape)


def _moved_by_each(
    p: torch.Tensor, weights: torch.Tensor, values: Sequence[torch.Tensor], total: int, lr: float
) -> torch.Tensor:
    """A tensor of the model moved by `lr` times that mean, of which one block at a time is in memory."""
    before, after = p.reshape(-1), torch.empty(p.numel(), dtype=p.dtype)

    def move(span: slice, mean: torch.Tensor) -> None:
        after[span] = before[span].to(torch.float64) + lr * mean

    _with_blocks_of_mean(weights, values, total, move)
    return after.reshape(p.shape)


def _with_blocks_of_mean(
    weights: torch.Tensor,
    values: Sequence[torch.Tensor],
    total: int,
    use: Callable[[slice, torch.Tensor], None],
) -> None:
    """Hand each block of the weighted mean to `use`, with its place in the flat tensor."""
    flat = [value.reshape(-1) for value in values]

    def fill(span: slice) -> None:
        block = torch.empty(len(flat), span.stop - span.start, dtype=torch.float64)
        torch._foreach_copy_(list(block.unbind()), [value[span] for value in flat])
        use(span, (weights @ block) / total)

    _by_blocks(fill, flat[0].numel(), _columns(weights, BLOCK))


def _by_blocks(work: Callable[[slice], None], count: int, size: int) -> None:
    """Call `work` for blocks of `size` out of `count` values, in parallel threads if there are several."""
    spans = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    for _ in _threads().map(work, spans) if len(spans) > 1 else map(work, spans):
        pass


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _columns(weights: torch.Tensor, block: int) -> int:
    return max(1, block // len(weights))


def moved(model: Tensors, step: Tensors) -> Tensors:
    """The model plus a float64 step, by name; each tensor keeps its dtype."""
    return {name: _added(p, step[name]) for name, p in model.items()}


def _added(p: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    before, by, after = p.reshape(-1), step.reshape(-1), torch.empty(p.numel(), dtype=p.dtype)

    def fill(span: slice) -> None:
        after[span] = before[span].to(torch.float64) + by[span]

    _by_blocks(fill, len(after), BLOCK // 8)
    return after.reshape(p.shape)
