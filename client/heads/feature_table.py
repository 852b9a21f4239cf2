"""Examples that heads learn from, as features of many clients in one table, and which rows are whose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.heads.layers import padded


@dataclass(frozen=True)
class FeatureTable:
    """Features [views * n, padded width] and their targets, which several clients' rows point into.

    View v of example i is in row v * n + i. Targets are classes for softmax, labels or values
    [views * n, outputs] for the other losses.
    """

    features: torch.Tensor
    targets: torch.Tensor
    views: int = 1

    @classmethod
    def of(cls, features: torch.Tensor, targets: torch.Tensor, device: str = "cpu") -> FeatureTable:
        """Features [n, width] or [views, n, width] of targets [n], on their device.

        Behind the features stand a one for the bias, and zeros.
        """
        views = len(features) if features.ndim == 3 else 1
        flat = features.reshape(-1, features.shape[-1])
        table = torch.zeros((len(flat), padded(flat.shape[1])))
        table[:, : flat.shape[1]] = flat
        table[:, flat.shape[1]] = 1
        return cls(table.to(device), torch.cat([targets] * views).to(device), views)

    @property
    def count(self) -> int:
        """How many examples there are, whatever their views."""
        return len(self.targets) // self.views


@dataclass(frozen=True)
class ClientRows:
    """One client's part of a round: its rows of the examples, in the first view.

    `batches` are places among those rows for each step, where they are drawn by Poisson's coins.
    """

    client: str
    rows: NDArray[np.int64]
    batches: tuple[NDArray[np.int64], ...] = ()

    @property
    def filler(self) -> int:
        """The row that fills batches up, where it counts nothing; a client without rows has another's."""
        return int(self.rows[0]) if len(self.rows) else 0
