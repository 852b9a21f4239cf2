"""A cache on disk for the states of inputs of one shape, such as pictures, by the input's hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atoll.learning.feature_cache import FeatureCache
from atoll.learning.prefix.state_cache import Compute


@dataclass(frozen=True)
class FixedStates:
    """States in float32, or rounded to bfloat16, by the key of their input."""

    cache: FeatureCache
    dtype: torch.dtype = torch.float32

    def missing(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """The first place among the keys of each that isn't cached."""
        absent = {keys[place]: place for place in reversed(self.cache.missing(keys))}
        return dict(sorted(absent.items(), key=lambda item: item[1]))

    def keep(self, keys: Sequence[bytes], inputs: torch.Tensor, compute: Compute) -> None:
        """Compute and store the states of inputs [n, …] under their keys, none of which is stored."""
        rows = torch.stack([states.flatten() for states in compute(list(inputs))])
        if rows.shape[1] % 2:
            rows = torch.nn.functional.pad(rows, (0, 1))
        # Two bfloat16 numbers are stored as one float32.
        self.cache.put(keys, rows.to(self.dtype).view(torch.float32))

    def take(self, keys: Sequence[bytes]) -> torch.Tensor:
        """The states of inputs with these keys, flattened: float32, [n, numbers].

        An odd number of them is followed by a zero.

        Raises:
            KeyError: the states of an input aren't stored.
        """
        return self.cache.take(keys).view(self.dtype).to(torch.float32)


def input_keys(inputs: torch.Tensor) -> list[bytes]:
    """The key of each input: a SHA-256 of its numbers."""
    return [hashlib.sha256(one.contiguous().cpu().numpy().tobytes()).digest() for one in inputs]
