"""The weights of late updates, and the interface of strategies that merge late updates.

The staleness d of an update, Xie et al.'s t - tau, is how many merges happened while its client trained: 0
if the client started from the present model. They define three weights s (2019, section 5.2), each of which
is 1 for an update that isn't late:

    constant:    s(d) = 1
    polynomial:  s(d) = (d + 1) ** -a
    hinge:       s(d) = 1 while d <= b, then 1 / (a * (d - b) + 1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from atoll.protocol.tensors import Tensors

Weighing = Literal["constant", "polynomial", "hinge"]


@dataclass(frozen=True)
class Drift(Mapping[str, torch.Tensor]):
    """The model from which a client started minus the present model, by name, in float64.

    Each tensor is computed on access: all of them together would be twice as large as the model.
    """

    start: Tensors
    now: Tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.start[name].to(torch.float64) - self.now[name].to(torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


class MergesLate(Protocol):
    """A strategy that transforms each late update before it is merged with others."""

    def late(self, delta: Tensors, drift: Mapping[str, torch.Tensor], staleness: int) -> Tensors:
        """The delta to merge, in the shapes and dtypes of `delta`.

        `delta` is the client's model minus its start; for several clients with the same start it is stacked
        to [clients, …]. `drift` is that start minus the present model, in float64. `staleness` is the number
        of merges since the start.
        """
        ...


def staleness_weight(weighing: Weighing, staleness: int, a: float, b: float) -> float:
    """The weight s(staleness) by the module's formulas, from 0 to 1.

    >>> staleness_weight("polynomial", 3, 0.5, 0), staleness_weight("hinge", 6, 10, 4)
    (0.5, 0.047619047619047616)
    """
    match weighing:
        case "constant":
            return 1.0
        case "polynomial":
            return float((staleness + 1.0) ** -a)
        case "hinge":
            return 1.0 if staleness <= b else 1.0 / (a * (staleness - b) + 1.0)


def scaled(delta: Tensors, weight: float) -> Tensors:
    """The delta times a weight, multiplied in float64; each tensor keeps its dtype."""
    return {name: (weight * d.to(torch.float64)).to(d.dtype) for name, d in delta.items()}


@dataclass(frozen=True)
class WeighsLate:
    """The common part of strategies that weight late updates: the function s, with its a and b."""

    weighing: Weighing = "polynomial"
    a: float = 0.5
    b: float = 4.0

    def weight(self, staleness: int) -> float:
        """The weight, from 0 to 1, of an update that is `staleness` merges late."""
        return staleness_weight(self.weighing, staleness, self.a, self.b)
