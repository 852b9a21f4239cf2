"""What every backbone is to the rest: an encoder of inputs, and a model with a head on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]

Preprocessed = torch.Tensor | Batch
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


class Encoder(nn.Module):
    """A backbone without its own head: prepared inputs to features [batch, width]."""

    model: nn.Module
    width: int

    reads_tokens: bool = False
    """Whether all that the network takes of a batch is `input_ids` and `attention_mask`, padded behind."""

    def preprocess(self, inputs: Sequence[Any]) -> Sequence[Preprocessed]:
        """Each raw input as a tensor that depends on no other input, so that it can be kept."""
        raise NotImplementedError

    def collate(self, ready: Sequence[Any]) -> Batch:
        """Inputs that are ready as one batch of tensors."""
        raise NotImplementedError

    def preprocess_and_collate(self, inputs: Sequence[Any], variation: Variation | None = None) -> Batch:
        """Raw inputs as one batch of tensors: as they are, or, where the encoder can, varied at random."""
        return self.collate(self.preprocess(inputs))

    def fixed_batches(
        self, inputs: Sequence[Any], size: int, variation: Variation | None = None
    ) -> Iterable[FixedBatch]:
        """Batches whose shapes don't depend on which other inputs there are; any thread may prepare one.

        A row's features are then the same bits whoever its neighbours are. Only features are made so:
        the network of a task that isn't `uses_pooled_features` needs none.
        """
        raise NotImplementedError


class FixedShapeEncoder(Encoder):
    """An encoder whose inputs all become tensors of one shape, so that any of them make a batch."""

    def prepared(self, inputs: Sequence[Any], places: Sequence[int], variation: Variation | None) -> Batch:
        """Raw inputs as one batch; `places` are theirs among all, by which their draws are found."""
        raise NotImplementedError

    def preprocess_and_collate(self, inputs: Sequence[Any], variation: Variation | None = None) -> Batch:
        return self.prepared(inputs, range(len(inputs)), variation)

    def fixed_batches(
        self, inputs: Sequence[Any], size: int, variation: Variation | None = None
    ) -> Iterable[FixedBatch]:
        for start in range(0, len(inputs), size):
            rows = list(range(start, min(start + size, len(inputs))))
            yield rows, partial(self._filled, [inputs[r] for r in rows], rows, variation, size)

    def _filled(
        self, inputs: Sequence[Any], places: Sequence[int], variation: Variation | None, size: int
    ) -> Batch:
        batch = self.prepared(inputs, places, variation)
        return {name: torch.cat([t, t[-1:].expand(size - len(t), *t.shape[1:])]) for name, t in batch.items()}


class Model(nn.Module):
    """A backbone and a head on its features.

    Where a network has its head inside, the backbone's encoder holds the network and `head` is that part
    of it; `forward` is then another.
    """

    head: nn.Module

    tunes_head: bool = True
    """Whether the head is trained beside the last blocks: not where it is tied to the first layer."""

    pretrained_head: frozenset[str]
    """The names, within the head, of the parameters that came with the weights; none of a fresh head."""

    def __init__(
        self, backbone: Encoder, head: nn.Module, pretrained_head: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.pretrained_head = pretrained_head
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

    def remember_start(self) -> None:
        """Keep what of the tuned tensors is needed later, once, while they are as before the first round."""

    def remember_unmerged(self, name: str, layer: nn.Module) -> None:
        """Keep what is needed later of the layer of this name, whose adapter is about to be merged."""

    def predict(self, batch: Batch) -> Any:
        """What the task's metrics take, one for each example of the batch."""
        return self(batch)

    def measure(self, batch: Batch) -> tuple[Any, torch.Tensor]:
        """(what the metrics take, what the loss takes): of one pass, where a model has both of one."""
        return self.predict(batch), self(batch)
