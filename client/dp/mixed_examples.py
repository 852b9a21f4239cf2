"""Networks in which examples of a batch see each other are refused: there no example has its own gradient.

Two looks, before the first private step. Layer by layer: a layer whose first example comes in as before, and
doesn't leave as before when its neighbours change. And as a whole: examples pass in batches of several sizes
and orders, in the mode in which the network trains, and what comes out for each, its gradient and its loss,
must be the same every time. The second look finds what happens between layers, in the loss, in draws that
torch doesn't make, or only in larger batches; the first finds what no output shows yet, behind zero weights.
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
from atoll.client.dp.per_example_gradients import PerExampleGradients, per_example_gradients
from atoll.client.dp.private_examples import batch_gradients, on_device
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.learning.determinism import repeatable
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import global_stream
from atoll.protocol.tensors import Tensors

TOLERANCE = 1e-4
"""How much of an example's gradient may differ between batches: what float32 rounds on its way."""

MEMBERS = 8
"""Examples of the largest batch: the first half are the client's, the others those with changed inputs."""

BATCHES: tuple[tuple[int, ...], ...] = (
    (0, 1, 2, 3, 4, 5, 6, 7), (7, 6, 5, 4, 3, 2, 1, 0), (5, 0, 6, 1, 7), (4, 2, 0), (7, 3), (1, 5), (2, 2),
)  # fmt: skip
"""Members of each batch: every place of a batch is some own example's. A pass has two examples at least."""

Seen = dict[int, dict[str, torch.Tensor]]
"""By member: its loss, and its gradient by parameter."""


def refuse_mixed_examples(learner: Learner, shard: Shard, *, hooks: bool) -> None:
    """Raises ConfigError where an example's gradient or loss depends on the batch that it passes in."""
    try:
        _look(learner, shard, hooks=hooks)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).partition("\n")[0]
        raise _refusal(learner, f"its gradients can't be taken example by example ({said})") from None


def _look(learner: Learner, shard: Shard, *, hooks: bool) -> None:
    probe = _Probe.of(learner, shard)
    with (
        repeatable(learner.job.train.device),
        per_example_gradients(learner.model, learner.training_loss(shard), hooks=hooks) as gradients,
    ):
        first = probe.seen(gradients, BATCHES[0])
        _compare(learner, first, probe.seen(gradients, BATCHES[0]), "drawn again from the same seeds")
        for members in BATCHES[1:]:
            told = f"in another batch, of {len(members)} examples"
            _compare(learner, first, probe.seen(gradients, members), told)


@dataclass(frozen=True)
class _Probe:
    """Some examples of a shard, and others that are surely different, to be passed in any batch."""

    learner: Learner
    shard: Shard
    rows: Sequence[int]

    @classmethod
    def of(cls, learner: Learner, shard: Shard) -> _Probe:
        own = np.linspace(0, len(shard) - 1, MEMBERS // 2).round().astype(int).tolist()
        return cls(learner, shard, [*own, *own])

    def seen(self, gradients: PerExampleGradients, members: Sequence[int]) -> Seen:
        """What comes out for each of the client's own examples among the members of a batch."""
        rows = [self.rows[member] for member in members]
        batch, targets = self.learner.batch(self.shard, rows), self.shard.targets_of(rows)
        batch = changed(batch, [place for place, member in enumerate(members) if member >= MEMBERS // 2])
        names = [member.to_bytes(32, "little") for member in range(MEMBERS)]
        numbers = example_numbers(names)[list(members)]
        step = (0, "", 0)
        found = dict(batch_gradients(self.learner, gradients, batch, targets, numbers, step))
        with torch.no_grad(), example_draws(numbers, self.learner.job.seed, step):
            there, aims = on_device(self.learner, batch, targets)
            outputs, loss = self.learner.model(there), self.learner.training_loss(self.shard)
            each = [loss(outputs[i : i + 1], aims[i : i + 1]) for i in range(len(members))]
        found["loss"] = torch.stack(each)
        own = {member: place for place, member in enumerate(members) if member < MEMBERS // 2}
        return {member: {name: t[place] for name, t in found.items()} for member, place in own.items()}


def _compare(learner: Learner, first: Seen, other: Seen, told: str) -> None:
    for member, values in other.items():
        for what, names in (("loss", {"loss"}), ("gradient", values.keys() - {"loss"})):
            moved = _difference(first[member], values, names)
            if not moved <= TOLERANCE:
                raise _refusal(learner, f"the {what} of an example is another one {told} (by {moved:.1%})")


def _difference(one: Tensors, other: Tensors, names: set[str]) -> float:
    """The L2 norm of the difference, relative to that of the first; zero where neither is finite."""
    pairs = [(one[name].double(), other[name].double()) for name in sorted(names)]
    if not all(bool(torch.isfinite(t).all()) for pair in pairs for t in pair):
        return 0.0
    apart = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(a.square().sum()) for a, _ in pairs))
    return apart / max(size, 1e-6)


def _refusal(learner: Learner, found: str) -> ConfigError:
    return ConfigError(
        f"backbone {learner.backbone.name}: {found}, so that no example has a gradient of its own; expected"
        " another backbone, or tune.method = 'head'"
    )


def refuse_mixing_layers(learner: Learner, batch: Batch) -> None:
    """Raises ConfigError, with the layer's name, where one mixes the examples of a batch."""
    several = {name: torch.cat([t] * 3)[:5] for name, t in batch.items()}
    mixing = mixing_layers(learner.model, changed(several, range(1, 5)))
    if mixing:
        raise _refusal(learner, f"layer {mixing[0]} mixes the examples of a batch")


def changed(batch: Batch, places: Sequence[int]) -> Batch:
    """The batch with other inputs at those places: numbers reversed, masks as they are."""
    found = {}
    for name, t in batch.items():
        found[name] = t.clone()
        for place in places:
            if torch.is_floating_point(t):
                found[name][place] = t[place].flip(-1) + 1
            elif "mask" not in name:
                found[name][place] = t[place].flip(-1)
    return found


def mixing_layers(model: nn.Module, batch: Batch) -> list[str]:
    """Layers and blocks in which an example's outputs depend on other examples, the first one first.

    Two batches that have only their first row in common go through; a module whose first row of inputs is
    the same in both, and of outputs isn't, mixes examples.
    """
    other = {name: torch.stack([t[0]] * len(t)) for name, t in batch.items()}
    calls = zip(_rows_seen(model, batch), _rows_seen(model, other), strict=False)
    found = [
        one.name
        for one, same in calls
        if one.name == same.name and _equal(one.inputs, same.inputs) and not _equal(one.outputs, same.outputs)
    ]
    return [name for name in dict.fromkeys(found) if not any(o.startswith(f"{name}.") for o in found)]


@dataclass(frozen=True)
class _Call:
    """The first rows of what went into a module and of what came out."""

    name: str
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def _rows_seen(model: nn.Module, batch: Batch) -> list[_Call]:
    """Every call of a module in the order in which they end; those that see no batch are left out."""
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


def _first_rows(values: tuple[object, ...], size: int) -> list[torch.Tensor]:
    return [v[0].clone() for v in values if isinstance(v, torch.Tensor) and v.dim() and len(v) == size]


def _equal(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )
