"""What goes into a secure sum and comes out: vectors of integers, with a share of the noise each.

The shares of `threshold` clients together are as much noise as the sum needs (Kairouz et al. 2021,
"The Distributed Discrete Gaussian Mechanism", section 4): if more of them answer there is more, and
with fewer the sum is never opened. Every number here that scales the vector is public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from atoll.errors import JobError
from atoll.privacy.dp_plan import DpPlan
from atoll.privacy.noise import Lattice, RandomBits, lattice_for
from atoll.privacy.secagg import Vector
from atoll.protocol.messages import Update
from atoll.protocol.requests import SumRequest
from atoll.protocol.tensors import Tensors

PLAIN_GRANULARITY = 2.0**-32
"""Of weighted sums without noise: they are exact to this, and must stay below 2^31."""
EXTRA = ("weight", "train_loss.sum", "train_loss.count")
"""What follows the tensors where nothing is promised: for a mean by examples, and the training loss."""


class OutOfRange(JobError):
    """A number is too large for a secure sum, or not finite."""


@dataclass(frozen=True)
class FixedPointCodec:
    """How vectors of a round become integers and back: everyone computes the same."""

    granularity: float
    lattice: Lattice | None

    @classmethod
    def of(cls, dp_plan: DpPlan | None, numbers: int, threshold: int, words: RandomBits) -> FixedPointCodec:
        """For so many numbers; with terms, a client's share of the noise is on the lattice."""
        if dp_plan is None:
            return cls(PLAIN_GRANULARITY, None)
        share = dp_plan.noise_multiplier / math.sqrt(threshold)
        lattice = lattice_for(share, dp_plan.promise.clipping_norm, numbers, words)
        return cls(lattice.granularity, lattice)

    def integers(self, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Vector:
        """Rounded to the lattice, with the share of the noise, modulo 2^64.

        Raises:
            OutOfRange: a number without noise is not finite or is 2^31 or more.
        """
        if self.lattice is None and not bool((np.abs(values) < 2.0**31).all()):
            raise OutOfRange("its update is not finite, or too large for a secure sum")
        whole: np.ndarray[tuple[int], np.dtype[np.int64]] = np.rint(values / self.granularity).astype(
            np.int64
        )
        if self.lattice is not None:
            whole = whole + self.lattice.whole_noise(len(values))
        return whole.view(np.uint64)

    def values(self, total: Vector) -> torch.Tensor:
        """The sum as float64 numbers, [numbers]."""
        return torch.from_numpy(total.view(np.int64).astype(np.float64) * self.granularity)


def length(model: Tensors, *, private: bool) -> int:
    """Numbers in a contribution."""
    return sum(t.numel() for t in model.values()) + (0 if private else len(EXTRA))


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All numbers in the order of the tensors' names, float64."""
    return torch.cat([tensors[name].reshape(-1).to(torch.float64) for name in sorted(tensors)])


def unflatten(numbers: torch.Tensor, model: Tensors) -> Tensors:
    """`flat` undone."""
    names = sorted(model)
    parts = torch.split(numbers, [model[name].numel() for name in names])
    return {name: part.reshape(model[name].shape) for name, part in zip(names, parts, strict=True)}


def weighted(update: Update) -> torch.Tensor:
    """An update for a mean by examples: its delta times its weight, the weight, and the training loss."""
    states = [update.states[name].reshape(1).to(torch.float64) for name in EXTRA[1:]]
    weight = torch.tensor([update.num_examples], dtype=torch.float64)
    return torch.cat([flat(update.delta) * update.num_examples, weight, *states])


def clipped(numbers: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    """The numbers, scaled so that their norm is `clipping_norm` at most; zeros if one is not finite."""
    norm = float(numbers.norm())
    if not math.isfinite(norm):
        return torch.zeros_like(numbers)
    return numbers * min(1.0, clipping_norm / max(norm, 1e-300))


def context_of(request: SumRequest) -> bytes:
    """What a secure sum's keys are bound to: the run, the round, and which try at it."""
    return f"{request.run} {request.round} {request.attempt}".encode()


def as_tensor(content: bytes) -> torch.Tensor:
    """Bytes as they travel, uint8 [length]."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()


def as_bytes(tensor: torch.Tensor) -> bytes:
    """`as_tensor` undone."""
    return tensor.numpy().tobytes()
