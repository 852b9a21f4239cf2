"""What a late update weighs, and the seam of a strategy that takes late ones.

The staleness d of an update, Xie et al.'s t - tau, is how many times the model was merged while its client
trained: 0 for one that was made from the model of now. Three weights s of it are theirs (2019, section 5.2),
each 1 for an update that isn't late:

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
    """How far the model that a client started from lies from the one of now, in float64.

    Each tensor is computed when it is asked for: all of them together are twice as large as the model.
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
    """A strategy that says what becomes of an update before it is merged with others."""

    def late(self, delta: Tensors, drift: Mapping[str, torch.Tensor], staleness: int) -> Tensors:
        """The update as it counts now, in the shapes and types of `delta`.

        `delta` is how far the client moved from where it started; several clients of one start have a
        first dimension more. `drift` is that start minus the model of now, in float64.
        """
        ...


def staleness_weight(weighing: Weighing, staleness: int, a: float, b: float) -> float:
    """s of the module's formulas, from 0 to 1.

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


@dataclass(frozen=True)
class WeighsLate:
    """What strategies share that weigh late updates: which function, and its a and b."""

    weighing: Weighing = "polynomial"
    a: float = 0.5
    b: float = 4.0

    def weight(self, staleness: int) -> float:
        """What an update counts that is so many merges late, from 0 to 1."""
        return staleness_weight(self.weighing, staleness, self.a, self.b)
