"""Refuses networks in which the examples of a batch influence each other, so that none has its own gradient.

Two tests, before the first private step. Layer by layer: when the other examples change, the output for an
unchanged first example must stay the same. And as a whole: in batches of several sizes and orders, with the
network in training mode, each example's gradient and loss must be the same every time. The second test finds
what happens between layers, in the loss, in draws outside of torch, or only in larger batches; the first one
finds what no output shows yet because weights are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from atoll.backbones.encoder import Batch
from atoll.client.dp.example_draws import example_draws, example_numbers
from atoll.client.dp.ghost_norms import folded_gradients
from atoll.client.dp.per_example_gradients import PerExampleGradients, per_example_gradients
from atoll.client.dp.private_examples import examples_together, on_device, passed_batch
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.learning.determinism import repeatable
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors

TOLERANCE = 1e-4
"""The relative difference that an example's gradient may have between batches, by float32 rounding."""

MEMBERS = 8
"""Examples in the largest batch: the first half are the client's, the others have changed inputs."""

BATCHES: tuple[tuple[int, ...], ...] = (
    (0, 1, 2, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1, 0), (5, 0, 6, 1, 7), (4, 2, 0), (7, 3), (1, 5), (2, 2),
)  # fmt: skip
"""The members of each batch: every position holds a client's example in some batch; two members at least."""

PAIRS: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3), (1, 0), (7, 3), (0, 5), (4, 2), (2, 2))
"""As `BATCHES`, where no more than a few examples fit into memory."""

MOST_KEPT = 2**16
"""How many numbers of a layer's output are compared; larger outputs are folded to so many sums."""

Seen = dict[int, dict[str, torch.Tensor]]
"""Each member's loss and gradient by parameter, by the member's number."""


def refuse_mixed_examples(learner: Learner, shard: Shard, *, hooks: bool) -> None:
    """Raises ConfigError where an example's gradient or loss depends on the batch that it passes in."""
    try:
        _look(learner, shard, hooks=hooks)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise _refusal(learner, f"its gradients can't be taken example by example ({reason})") from None


def _look(learner: Learner, shard: Shard, *, hooks: bool) -> None:
    probe = _Probe.of(learner, shard)
    model, loss = learner.model, learner.objective.loss(shard)
    ghost = learner.job.privacy.ghost_norms
    by_example = folded_gradients(model, loss) if ghost else per_example_gradients(model, loss, hooks=hooks)
    batches = BATCHES if examples_together(learner, shard) >= MEMBERS else PAIRS
    with repeatable(learner.job.train.device), by_example as gradients:
        first: Seen = {}
        for number, members in enumerate(batches):
            seen = probe.seen(gradients, members)
            if not number:
                again = probe.seen(gradients, members)
                _compare(learner, seen, again, "drawn again from the same seeds")
            known = {member: seen[member] for member in seen.keys() & first.keys()}
            _compare(learner, first, known, f"in another batch, of {len(members)} examples")
            first = seen | first


@dataclass(frozen=True)
class _Probe:
    """Some of a shard's examples and changed copies of them, to be put into batches."""

    learner: Learner
    shard: Shard
    rows: Sequence[int]

    @classmethod
    def of(cls, learner: Learner, shard: Shard) -> _Probe:
        examples = np.linspace(0, len(shard) - 1, MEMBERS // 2).round().astype(int).tolist()
        return cls(learner, shard, [*examples, *examples])

    def seen(self, gradients: PerExampleGradients, members: Sequence[int]) -> Seen:
        """The losses and gradients of the client's own examples among the members of a batch."""
        rows = [self.rows[member] for member in members]
        batch, targets = self.learner.batch(self.shard, rows), self.shard.targets_of(rows)
        batch = changed(batch, [place for place, member in enumerate(members) if member >= MEMBERS // 2])
        names = [member.to_bytes(32, "little") for member in range(MEMBERS)]
        numbers = example_numbers(names)[list(members)]
        step = (0, "", 0)
        outcomes = dict(passed_batch(self.learner, gradients, batch, targets, numbers, step))
        with torch.no_grad(), example_draws(numbers, self.learner.job.seed, step):
            there, aims = on_device(self.learner, batch, targets)
            outputs, loss = self.learner.model(there), self.learner.objective.loss(self.shard)
            each = [loss(outputs[i : i + 1], aims[i : i + 1]) for i in range(len(members))]
        outcomes["loss"] = torch.stack(each)
        places = {member: place for place, member in enumerate(members) if member < MEMBERS // 2}
        return {member: {name: t[place] for name, t in outcomes.items()} for member, place in places.items()}


def _compare(learner: Learner, first: Seen, other: Seen, where: str) -> None:
    for member, values in other.items():
        for what, names in (("loss", {"loss"}), ("gradient", values.keys() - {"loss"})):
            moved = _difference(first[member], values, names)
            if not moved <= TOLERANCE:
                raise _refusal(learner, f"the {what} of an example is another one {where} (by {moved:.1%})")


def _difference(one: Tensors, other: Tensors, names: set[str]) -> float:
    """The L2 norm of the difference, relative to that of the first; zero where neither is finite."""
    pairs = [(one[name].double(), other[name].double()) for name in sorted(names)]
    if not all(bool(torch.isfinite(t).all()) for pair in pairs for t in pair):
        return 0.0
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(a.square().sum()) for a, _ in pairs))
    return apart / max(size, 1e-6)


def _refusal(learner: Learner, fault: str) -> ConfigError:
    return ConfigError(
        f"backbone {learner.backbone.name}: {fault}, so that no example has a gradient of its own; expected"
        " another backbone, or tune.method = 'head'"
    )


def refuse_mixing_layers(learner: Learner, batch: Batch) -> None:
    """Raises ConfigError, with the layer's name, where one mixes the examples of a batch."""
    several = {name: torch.cat([t] * 3)[:5] for name, t in batch.items()}
    mixing = mixing_layers(learner.model, changed(several, range(1, 5)))
    if mixing:
        raise _refusal(learner, f"layer {mixing[0]} mixes the examples of a batch")


def changed(batch: Batch, places: Sequence[int]) -> Batch:
    """The batch with other inputs at these places: numbers in reverse order, masks unchanged."""
    inputs = {}
    for name, t in batch.items():
        inputs[name] = t.clone()
        for place in places:
            if torch.is_floating_point(t):
                inputs[name][place] = t[place].flip(-1) + 1
            elif "mask" not in name:
                inputs[name][place] = t[place].flip(-1)
    return inputs


def mixing_layers(model: nn.Module, batch: Batch) -> list[str]:
    """Names of layers and blocks in which an example's outputs depend on other examples, in order of calls.

    Two batches are computed that share only their first row. A module mixes examples if its first input row
    is the same in both and its first output row is not.
    """
    other = {name: torch.stack([t[0]] * len(t)) for name, t in batch.items()}
    calls = zip(_rows_seen(model, batch), _rows_seen(model, other), strict=False)
    mixing = [
        one.name
        for one, same in calls
        if one.name == same.name and _equal(one.inputs, same.inputs) and not _equal(one.outputs, same.outputs)
    ]
    return [name for name in dict.fromkeys(mixing) if not any(o.startswith(f"{name}.") for o in mixing)]


@dataclass(frozen=True)
class _Row:
    """An example's numbers, [n], and what their rounding is relative to."""

    values: torch.Tensor
    sizes: torch.Tensor

    @classmethod
    def of(cls, row: torch.Tensor) -> _Row:
        """Of a tensor of any shape; of a large one sums of every n-th number, relative to their norm."""
        flat = row.detach().flatten()
        flat = flat.to(torch.uint8) if flat.dtype == torch.bool else flat
        if flat.numel() <= MOST_KEPT:
            kept = flat.clone()
            return cls(kept, kept)
        folded = nn.functional.pad(flat.double(), (0, -flat.numel() % MOST_KEPT)).view(-1, MOST_KEPT)
        return cls(folded.sum(0), torch.linalg.vector_norm(folded, dim=0))

    def equals(self, other: _Row) -> bool:
        """Whether all numbers are the same, but for rounding."""
        if self.values.shape != other.values.shape:
            return False
        apart, most = (self.values - other.values).abs(), 1e-6 + 1e-4 * other.sizes.abs()
        same = (self.values == other.values) | (apart.isfinite() & (apart <= most))
        return bool((same | (self.values.isnan() & other.values.isnan())).all())


@dataclass(frozen=True)
class _Call:
    """The first rows of a module's inputs and outputs in one call."""

    name: str
    inputs: list[_Row]
    outputs: list[_Row]


def _rows_seen(model: nn.Module, batch: Batch) -> list[_Call]:
    """Every call of a module, in the order in which calls end, without calls whose tensors have no batch."""
    size = len(next(iter(batch.values())))
    seen: list[_Call] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
            before, after = _first_rows(inputs, size), _first_rows((outputs,), size)
            if before and after:
                seen.append(_Call(name, before, after))

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad(), global_stream(0, "dropout"):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first_rows(values: tuple[object, ...], size: int) -> list[_Row]:
    return [_Row.of(v[0]) for v in values if isinstance(v, torch.Tensor) and v.dim() and len(v) == size]


def _equal(a: Sequence[_Row], b: Sequence[_Row]) -> bool:
    return len(a) == len(b) and all(x.equals(y) for x, y in zip(a, b, strict=True))
