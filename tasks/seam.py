"""The seam of a task: what is read, what is built, what is minimised, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from protocol.job import BackboneSection, DataSection, Job, Options
from protocol.messages import Facts
from protocol.tensors import Tensors
from tasks.dataset import Dataset
from tasks.lazy import picked

if TYPE_CHECKING:
    import pyarrow as pa
    from torchmetrics import MetricCollection

    from tasks.reading import Findings, Table
    from tasks.weights import Backbone

Batch = dict[str, torch.Tensor]

Ready = torch.Tensor | Batch
"""One input as an encoder keeps it: a tensor, or several by name."""

TARGETS = "targets"
"""The name under which a batch holds the targets, for models that must see them to say a loss."""

FixedBatch = tuple[list[int], Callable[[], Batch]]
"""(rows, what prepares them); where the batch has more rows than that, the rest is padding."""


@dataclass(frozen=True)
class Variation:
    """How inputs vary at random: by which of the task's augmentations, and each input's own draws."""

    names: tuple[str, ...]
    stream: Callable[[int], torch.Generator]
    """By place among the inputs; a generator that several share is drawn from in their order."""


@dataclass(frozen=True)
class Lazy:
    """Targets that are made when a batch needs them, so that not all are in memory."""

    row: Callable[[int], torch.Tensor]
    rows: tuple[int, ...]

    def __getitem__(self, places: Sequence[int]) -> torch.Tensor:
        return torch.stack([self.row(self.rows[place]) for place in places])

    def select(self, places: Sequence[int]) -> Lazy:
        """Those targets, in that order."""
        return Lazy(self.row, tuple(self.rows[place] for place in places))


@dataclass(frozen=True)
class Shard:
    """Examples of one owner in canonical order: by the hash of their content.

    The order on disk, the file format and the names of files thus change nothing.
    `inputs` are raw (texts, or encoded images), `targets` is what the task predicts, [n, …].
    `groups` has, for tasks that split by more than an example (a patient, a day), what that is.
    """

    inputs: Sequence[Any]
    targets: torch.Tensor | Lazy
    keys: tuple[bytes, ...]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: Sequence[int]) -> Shard:
        """Those rows, in that order."""
        keys = tuple(self.keys[row] for row in rows)
        inputs = picked(self.inputs, rows)
        groups = tuple(self.groups[row] for row in rows) if self.groups else ()
        if isinstance(self.targets, Lazy):
            return Shard(inputs, self.targets.select(rows), keys, groups)
        return Shard(inputs, self.targets[torch.tensor(rows, dtype=torch.int64)], keys, groups)

    def targets_of(self, rows: Sequence[int]) -> torch.Tensor:
        """Targets of some rows, [len(rows), …]."""
        return self.targets[list(rows)]

    @property
    def table(self) -> torch.Tensor:
        """All targets, of a task that learns on features: they are few numbers an example."""
        assert isinstance(self.targets, torch.Tensor)
        return self.targets


def canonical_order(keys: Sequence[bytes]) -> list[int]:
    """Rows in the order of their examples' hashes."""
    return sorted(range(len(keys)), key=keys.__getitem__)


class Encoder(nn.Module):
    """A backbone without its own head: prepared inputs to features [batch, width]."""

    model: nn.Module
    width: int

    def ready(self, inputs: Sequence[Any]) -> Sequence[Ready]:
        """Each raw input as a tensor that depends on no other input, so that it can be kept."""
        raise NotImplementedError

    def batch(self, ready: Sequence[Any]) -> Batch:
        """Inputs that are ready as one batch of tensors."""
        raise NotImplementedError

    def prepare(self, inputs: Sequence[Any], variation: Variation | None = None) -> Batch:
        """Raw inputs as one batch of tensors: as they are, or, where the encoder can, varied at random."""
        return self.batch(self.ready(inputs))

    def fixed_batches(
        self, inputs: Sequence[Any], size: int, variation: Variation | None = None
    ) -> Iterable[FixedBatch]:
        """Batches whose shapes don't depend on which other inputs there are; any thread may prepare one.

        A row's features are then the same bits whoever its neighbours are. Only features are made so:
        the network of a task that isn't `on_features` needs none.
        """
        raise NotImplementedError


class Model(nn.Module):
    """A backbone and a head on its features.

    Where a network has its head inside, the backbone's encoder holds the network and `head` is that part
    of it; `forward` is then another.
    """

    head: nn.Module

    def __init__(self, backbone: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        if any(module is head for module in backbone.modules()):
            # Not as a second place in the tree: functional calls would leave one tensor behind in the other.
            object.__setattr__(self, "head", head)
        else:
            self.head = head

    def forward(self, batch: Batch) -> torch.Tensor:
        """What the task's loss takes, [batch, …]: here the head's outputs, [batch, outputs]."""
        output: torch.Tensor = self.head(self.backbone(batch))
        return output

    def predict(self, batch: Batch) -> Any:
        """What the task's metrics take, one for each example of the batch."""
        return self(batch)


class Task(Protocol):
    """One kind of learning problem; a new one is a file and a line in the registry.

    A task `on_features` has a head on one row of features an example, which may be kept and trained on at
    once: it says `encoder`, `head` and `head_loss`. Any other says `network`, the whole model.
    """

    name: str
    """What jobs call it."""

    summary: str
    """One line for `atoll list tasks`."""

    on_features: bool = True
    """Whether the head sees one row of features an example."""

    sees_targets: bool = False
    """Whether a batch to learn from holds the targets too (`TARGETS`): the words said so far, the boxes."""

    splits_itself: bool = False
    """Whether `split` says what a client trains on and what it measures on."""

    headline: str = "accuracy"
    """The metric that a run is judged by."""

    head_loss: Literal["softmax", "sigmoid", "squared"] = "softmax"
    """Which closed form `loss` has: cross_entropy, binary_cross_entropy_with_logits or mse_loss."""

    def bound(self, job: Job, backbone: Backbone) -> Task:
        """This task as a job and its resolved backbone make it, above all by `task.options`.

        `loss`, `metrics` and `shard` are asked of what it returns.
        """
        return self

    def check(self, job: Job) -> None:
        """Raises ConfigError where the job asks for what there isn't for this task."""
        ...

    def read(self, source: Path, data: DataSection, options: Options) -> Table:
        """One owner's data, every example checked; `options` are the job's `task.options`."""
        ...

    def adopt(self, splits: Mapping[str, pa.Table], job: Job) -> Table:
        """The splits of a built-in source, which are in the task's own columns and trusted."""
        ...

    def write(self, dataset: Dataset, folder: Path, data: DataSection) -> None:
        """Write rows into a new folder, as `read` with the same `data` reads them back."""
        ...

    def inspect(self, source: Path, data: DataSection, options: Options) -> Findings:
        """What is in the data and what is wrong with it, for `atoll check`."""
        ...

    def keys(self, dataset: Dataset) -> list[bytes]:
        """A 32-byte hash of each example's content: not of its path or place."""
        ...

    def groups(self, dataset: Dataset) -> list[str] | None:
        """What must not be split between training and test, or between clients: a patient, say."""
        return None

    def split(self, shard: Shard, seed: int, fraction: float) -> tuple[list[int], list[int]]:
        """(rows to train on, rows to measure on) within a client, of a task that `splits_itself`."""
        raise TypeError(f"{self.name} splits by content alone")

    def describe(self, dataset: Dataset, data: DataSection, options: Options) -> Facts:
        """What must be known of the data before a model can be built."""
        ...

    def agree(self, facts: Sequence[Facts]) -> Facts:
        """The facts that hold for all clients together."""
        ...

    def shard(self, dataset: Dataset, facts: Facts, keys: Sequence[bytes] | None = None) -> Shard:
        """Rows as inputs and targets, in canonical order; `keys` where they are known already."""
        ...

    def raw_input(self, given: str) -> Any:
        """One input of `atoll predict` as a shard holds it."""
        ...

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        """The backbone as an encoder of this task's inputs."""
        raise TypeError(f"{self.name} has no encoder of its own, but a network")

    def head(self, width: int, facts: Facts) -> nn.Module:
        """A fresh head; its initial values come from the global generator."""
        raise TypeError(f"{self.name} has no head of its own, but a network")

    def network(self, backbone: Backbone, job: Job, facts: Facts) -> Model:
        """The whole model, of a task that isn't `on_features`; its first values come from the job's seed."""
        raise TypeError(f"{self.name} has a head on an encoder, and no network of its own")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over the batch."""
        ...

    def metrics(self, facts: Facts) -> MetricCollection:
        """Metrics whose states add up over clients; they take predictions and targets."""
        ...

    def measured_loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss on examples that are only measured on, where that is another one."""
        return self.loss(outputs, targets)

    def measured(self, predictions: Any, targets: torch.Tensor) -> tuple[Any, ...]:
        """What `update` of the metrics takes."""
        return predictions, targets

    def references(self, shard: Shard, facts: Facts) -> dict[str, Any]:
        """Predictions that need no learning, by name, which a result always stands beside: the last value."""
        return {}

    def answer(self, predictions: Any, facts: Facts) -> list[dict[str, Any]]:
        """What `atoll predict` prints for each prediction; `label` comes first."""
        ...


__all__ = ["TARGETS", "Batch", "Encoder", "Facts", "Lazy", "Model", "Ready", "Shard", "Task", "Tensors"]
