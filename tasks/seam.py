"""The seam of a task: what is read, what is built, what is minimised, what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from protocol.job import BackboneSection, DataSection, Job
from protocol.messages import Facts
from protocol.tensors import Tensors
from tasks.lazy import Picked

if TYPE_CHECKING:
    import datasets
    from torchmetrics import MetricCollection

    from tasks.reading import Findings, Table
    from tasks.weights import Backbone

Batch = dict[str, torch.Tensor]

FixedBatch = tuple[list[int], Callable[[], Batch]]
"""(rows, what prepares them); where the batch has more rows than that, the rest is padding."""


@dataclass(frozen=True)
class Variation:
    """How inputs vary at random: by which of the task's augmentations, and each input's own draws."""

    names: tuple[str, ...]
    stream: Callable[[int], torch.Generator]
    """By place among the inputs; a generator that several share is drawn from in their order."""


@dataclass(frozen=True)
class Shard:
    """Examples of one owner in canonical order: by the hash of their content.

    The order on disk, the file format and the names of files thus change nothing.
    `inputs` are raw (texts, or encoded images), `targets` is what the task predicts, [n].
    """

    inputs: Sequence[Any]
    targets: torch.Tensor
    keys: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: Sequence[int]) -> Shard:
        """Those rows, in that order."""
        index = torch.tensor(rows, dtype=torch.int64)
        keys = tuple(self.keys[row] for row in rows)
        return Shard(Picked(self.inputs.__getitem__, tuple(rows)), self.targets[index], keys)


def canonical_order(keys: Sequence[bytes]) -> list[int]:
    """Rows in the order of their examples' hashes."""
    return sorted(range(len(keys)), key=keys.__getitem__)


class Encoder(nn.Module):
    """A backbone without its own head: prepared inputs to features [batch, width]."""

    model: nn.Module
    width: int

    def ready(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Each raw input as a tensor that depends on no other input, so that it can be kept."""
        raise NotImplementedError

    def batch(self, ready: Sequence[torch.Tensor]) -> Batch:
        """Inputs that are ready as one batch of tensors."""
        raise NotImplementedError

    def prepare(self, inputs: Sequence[Any], variation: Variation | None = None) -> Batch:
        """Raw inputs as one batch of tensors: as they are, or varied at random."""
        raise NotImplementedError

    def fixed_batches(
        self, inputs: Sequence[Any], size: int, variation: Variation | None = None
    ) -> Iterable[FixedBatch]:
        """Batches whose shapes don't depend on which other inputs there are; any thread may prepare one.

        A row's features are then the same bits whoever its neighbours are.
        """
        raise NotImplementedError


class Model(nn.Module):
    """A backbone and a head on its features."""

    def __init__(self, backbone: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: Batch) -> torch.Tensor:
        """Head outputs, [batch, outputs]."""
        output: torch.Tensor = self.head(self.backbone(batch))
        return output


class Task(Protocol):
    """One kind of learning problem; a new one is a file and a line in the registry."""

    @property
    def name(self) -> str:
        """What jobs call it."""
        ...

    @property
    def summary(self) -> str:
        """One line for `atoll list tasks`."""
        ...

    def check(self, job: Job) -> None:
        """Raises ConfigError where the job asks for what there isn't for this task."""
        ...

    def read(self, source: Path, data: DataSection) -> Table:
        """One owner's data, every example checked."""
        ...

    def write(self, dataset: datasets.Dataset, folder: Path, data: DataSection) -> None:
        """Write rows into a new folder, as `read` with the same `data` reads them back."""
        ...

    def inspect(self, source: Path, data: DataSection) -> Findings:
        """What is in the data and what is wrong with it, for `atoll check`."""
        ...

    def describe(self, dataset: datasets.Dataset, data: DataSection) -> Facts:
        """What must be known of the data before a model can be built."""
        ...

    def agree(self, facts: Sequence[Facts]) -> Facts:
        """The facts that hold for all clients together."""
        ...

    def shard(self, dataset: datasets.Dataset, facts: Facts, keys: Sequence[bytes] | None = None) -> Shard:
        """Rows as inputs and targets, in canonical order; `keys` where they are known already."""
        ...

    def raw_input(self, given: str) -> Any:
        """One input of `atoll predict` as a shard holds it."""
        ...

    def encoder(self, backbone: Backbone, section: BackboneSection, seed: int) -> Encoder:
        """The backbone as an encoder of this task's inputs."""
        ...

    def head(self, width: int, facts: Facts) -> nn.Module:
        """A fresh head; its initial values come from the global generator."""
        ...

    @property
    def head_loss(self) -> Literal["softmax", "sigmoid", "squared"]:
        """Which closed form `loss` has: cross_entropy, binary_cross_entropy_with_logits or mse_loss."""
        ...

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over the batch."""
        ...

    def metrics(self, facts: Facts) -> MetricCollection:
        """Metrics whose states add up over clients."""
        ...

    def answer(self, outputs: torch.Tensor, facts: Facts) -> list[dict[str, Any]]:
        """What `atoll predict` prints for each row of outputs."""
        ...


__all__ = ["Batch", "Encoder", "Facts", "Model", "Shard", "Task", "Tensors"]
