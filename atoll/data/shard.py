"""The examples of one client, ordered by the hash of their content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atoll.data.lazy import take


@dataclass(frozen=True)
class Lazy:
    """Targets that are computed when a batch needs them, so that they are not all in memory."""

    row: Callable[[int], torch.Tensor]
    rows: tuple[int, ...]

    def __getitem__(self, places: Sequence[int]) -> torch.Tensor:
        return torch.stack([self.row(self.rows[place]) for place in places])

    def select(self, places: Sequence[int]) -> Lazy:
        """The targets at these places, in that order."""
        return Lazy(self.row, tuple(self.rows[place] for place in places))


@dataclass(frozen=True)
class Shard:
    """The examples of one client in canonical order: by the hash of their content.

    The order on disk, the file format and the names of files thus change nothing. For n examples, `inputs`
    holds n raw inputs (texts, or encoded images), `targets` [n, …] what the task predicts, and `keys` n
    hashes of 32 bytes. `groups` has n names where examples belong together, such as their patients', else
    none.
    """

    inputs: Sequence[Any]
    targets: torch.Tensor | Lazy
    keys: tuple[bytes, ...]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, rows: Sequence[int]) -> Shard:
        """The examples at these rows, in that order."""
        keys = tuple(self.keys[row] for row in rows)
        inputs = take(self.inputs, rows)
        groups = tuple(self.groups[row] for row in rows) if self.groups else ()
        if isinstance(self.targets, Lazy):
            return Shard(inputs, self.targets.select(rows), keys, groups)
        return Shard(inputs, self.targets[torch.tensor(rows, dtype=torch.int64)], keys, groups)

    def targets_of(self, rows: Sequence[int]) -> torch.Tensor:
        """Targets of some rows, [len(rows), …]."""
        return self.targets[list(rows)]

    @property
    def table(self) -> torch.Tensor:
        """All targets, [n, …], of a task that trains on features; they are small enough for memory."""
        assert isinstance(self.targets, torch.Tensor)
        return self.targets


def canonical_order(keys: Sequence[bytes]) -> list[int]:
    """Rows in the order of their examples' hashes."""
    return sorted(range(len(keys)), key=keys.__getitem__)
