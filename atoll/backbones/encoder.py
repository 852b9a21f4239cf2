"""The two interfaces of every backbone: an encoder from inputs to features, and a model with a head on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atoll.errors import ConfigError

if TYPE_CHECKING:
    from atoll.plugins import Extension

Batch = dict[str, torch.Tensor]
"""The network's inputs for several examples, by name, each [batch, …]."""

Preprocessed = torch.Tensor | Batch
"""One preprocessed input: a tensor, or several by name, without a batch dimension."""

TARGETS = "targets"
"""The name under which a batch holds the targets, for models that need them to compute their loss."""

PIXELS = "pixel_values"
"""The entry of a batch that holds pictures, [batch, 3, height, width]."""

FixedBatch = tuple[list[int], Callable[[], Batch]]
"""(row numbers, a function that prepares their batch); further rows of the batch are padding."""


@dataclass(frozen=True)
class Variation:
    """How inputs are augmented: by which augmentations, and with which random generator for each input."""

    names: tuple[str, ...]
    stream: Callable[[int], torch.Generator]
    """From an input's place among all inputs to its generator; inputs that share one draw in order."""
    brought: tuple[Extension, ...] = ()
    """Those of the augmentations that extensions bring, ready to be called."""


@dataclass(frozen=True)
class FixedInput:
    """The only input of a network: a tensor of the same shape for every example."""

    name: str
    """Under which it is in a batch, [batch, *shape]."""
    shape: tuple[int, ...]
    layout: torch.memory_format = torch.contiguous_format
    beside: Mapping[str, int] = field(default_factory=dict)
    """Other entries of a batch, [batch], that the network doesn't read: a possible value of each, by name."""


def in_layout(tensor: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """The tensor in this memory layout; layouts other than the usual one are for four dimensions only.

    Raises:
        ConfigError: torch.func, which has no other layouts, computes many clients or examples at once.
    """
    if tensor.dim() != 4:
        return tensor.contiguous()
    try:
        return tensor.contiguous(memory_format=layout)
    except RuntimeError as error:
        if "inside of vmap" not in str(error) and "inside vmap" not in str(error):
            raise
        raise ConfigError(
            "backbone.channels_last: torch.func has no such layout, and --engine cohort, or private steps of"
            " a network that Opacus has no rule for, compute with it; expected false"
        ) from error


class Encoder(nn.Module):
    """A backbone without its own head: `forward` maps a batch of preprocessed inputs to [batch, width]."""

    model: nn.Module
    width: int

    reads_tokens: bool = False
    """Whether the network's only inputs are `input_ids` and `attention_mask`, both padded on the right."""

    @property
    def fixed_input(self) -> FixedInput | None:
        """The network's only input, where all examples' inputs have one shape; None for other networks."""
        return None

    def preprocess(self, inputs: Sequence[Any]) -> Sequence[Preprocessed]:
        """Each raw input as tensors that depend on no other input, so that they can be cached."""
        raise NotImplementedError

    def collate(self, ready: Sequence[Any]) -> Batch:
        """Preprocessed inputs stacked or padded to one batch, [batch, …]."""
        raise NotImplementedError

    def preprocess_and_collate(self, inputs: Sequence[Any], variation: Variation | None = None) -> Batch:
        """Raw inputs as one batch, [batch, …], augmented where `variation` is given and the encoder can."""
        return self.collate(self.preprocess(inputs))

    def fixed_batches(
        self, inputs: Sequence[Any], size: int, variation: Variation | None = None
    ) -> Iterable[FixedBatch]:
        """Batches whose shapes do not depend on the other inputs; any thread may prepare one.

        A row's features then have the same bits whatever else is in its batch. Only features are computed
        this way, so encoders of tasks without pooled features need not implement it.
        """
        raise NotImplementedError


class FixedShapeEncoder(Encoder):
    """An encoder whose inputs all become tensors of one shape, so that any of them make a batch."""

    def prepared(self, inputs: Sequence[Any], places: Sequence[int], variation: Variation | None) -> Batch:
        """Raw inputs as one batch, [batch, …]; `variation.stream` draws for each by its place in `places`."""
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

    Where a pretrained network contains its head, `backbone` holds the whole network, `head` is a submodule
    of it, and a subclass overrides `forward`.
    """

    head: nn.Module

    tunes_head: bool = True
    """Whether the head is trained, alone or beside the last blocks; False where the first layer shares it."""

    pretrained_head: frozenset[str]
    """Names, within the head, of parameters loaded with the backbone's weights; empty for a new head."""

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
        """The outputs that the task's loss takes, [batch, …]: here the head's, [batch, outputs]."""
        output: torch.Tensor = self.head(self.backbone(batch))
        return output

    def remember_start(self) -> None:
        """Store what is needed later of the tuned tensors' initial values; called once, before training."""

    def remember_unmerged(self, name: str, layer: nn.Module) -> None:
        """Store what is needed later of a layer, by name, before its LoRA adapter is merged into it."""

    def predict(self, batch: Batch) -> Any:
        """The predictions that the task's metrics take, one per example of the batch."""
        return self(batch)

    def measure(self, batch: Batch) -> tuple[Any, torch.Tensor]:
        """(predictions for the metrics, outputs for the loss), in one forward pass where the model can."""
        return self.predict(batch), self(batch)
