"""Encodes updates for a secure sum as vectors of integers with a share of the noise, and decodes the sum.

The noise shares of `threshold` clients together are as much as the sum needs (Kairouz et al. 2021, "The
Distributed Discrete Gaussian Mechanism", section 4). If more clients answer there is more noise; with fewer
the sum is never opened. Every factor that scales the vector is public.
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
"""The precision of weighted sums without noise, whose values must stay below 2^31."""
EXTRA = ("weight", "train_loss.sum", "train_loss.count")
"""Numbers after the tensors where no privacy is promised, for a weighted mean and the training loss."""


class OutOfRange(JobError):
    """A number is too large for a secure sum, or not finite."""


@dataclass(frozen=True)
class FixedPointCodec:
    """Converts a round's vectors to integers and sums back; all clients and the server use the same one."""

    granularity: float
    lattice: Lattice | None

    @classmethod
    def of(
        cls, dp_plan: DpPlan | None, numbers: int, threshold: int, random_bits: RandomBits
    ) -> FixedPointCodec:
        """The codec for vectors of `numbers` numbers; with a plan, integers include the client's noise."""
        if dp_plan is None:
            return cls(PLAIN_GRANULARITY, None)
        share = dp_plan.noise_multiplier / math.sqrt(threshold)
        lattice = lattice_for(share, dp_plan.promise.clipping_norm, numbers, random_bits)
        return cls(lattice.granularity, lattice)

    def integers(self, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Vector:
        """The values [numbers] rounded to the grid, with the client's share of the noise, modulo 2^64.

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
    """How many numbers a contribution has."""
    return sum(t.numel() for t in model.values()) + (0 if private else len(EXTRA))


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All numbers of the tensors as one float64 vector, in the order of the tensors' names."""
    return torch.cat([tensors[name].reshape(-1).to(torch.float64) for name in sorted(tensors)])


def unflatten(numbers: torch.Tensor, model: Tensors) -> Tensors:
    """The inverse of `flat`: a vector as tensors with the names and shapes of `model`."""
    names = sorted(model)
    parts = torch.split(numbers, [model[name].numel() for name in names])
    return {name: part.reshape(model[name].shape) for name, part in zip(names, parts, strict=True)}


def weighted(update: Update) -> torch.Tensor:
    """An update's vector for a weighted mean: delta times weight, the weight and the training loss."""
    states = [update.states[name].reshape(1).to(torch.float64) for name in EXTRA[1:]]
    weight = torch.tensor([update.num_examples], dtype=torch.float64)
    return torch.cat([flat(update.delta) * update.num_examples, weight, *states])


def clipped(numbers: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    """The numbers scaled to an L2 norm of at most `clipping_norm`; zeros if one is not finite."""
    norm = float(numbers.norm())
    if not math.isfinite(norm):
        return torch.zeros_like(numbers)
    return numbers * min(1.0, clipping_norm / max(norm, 1e-300))


def context_of(request: SumRequest) -> bytes:
    """The context to which a secure sum's keys are bound: run, round and attempt."""
    return f"{request.run} {request.round} {request.attempt}".encode()


def as_tensor(content: bytes) -> torch.Tensor:
    """Bytes as they travel, uint8 [length]."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()


def as_bytes(tensor: torch.Tensor) -> bytes:
    """The inverse of `as_tensor`."""
    return tensor.numpy().tobytes()
