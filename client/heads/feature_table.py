"""One table with the features of many clients' examples, and the rows of each client in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.heads.layers import padded


@dataclass(frozen=True)
class FeatureTable:
    """Features [views * n, padded width] of n examples, and their targets; clients refer to its rows.

    View v of example i is in row v * n + i. Targets are classes for the softmax loss, labels or values
    [views * n, outputs] for the other losses.
    """

    features: torch.Tensor
    targets: torch.Tensor
    views: int = 1

    @classmethod
    def of(cls, features: torch.Tensor, targets: torch.Tensor, device: str = "cpu") -> FeatureTable:
        """The table of features [n, width] or [views, n, width] and targets [n], on `device`.

        A 1 for the bias and zeros as padding are appended to each row.
        """
        if not len(targets):
            # Padding of a batch points at a row, also where no client has any.
            features = features.new_zeros((*features.shape[:-2], 1, features.shape[-1]))
            targets = targets.new_zeros((1, *targets.shape[1:]))
        views = len(features) if features.ndim == 3 else 1
        flat = features.reshape(-1, features.shape[-1])
        table = torch.zeros((len(flat), padded(flat.shape[1])))
        table[:, : flat.shape[1]] = flat
        table[:, flat.shape[1]] = 1
        return cls(table.to(device), torch.cat([targets] * views).to(device), views)

    @property
    def count(self) -> int:
        """The number n of examples, without their further views."""
        return len(self.targets) // self.views


@dataclass(frozen=True)
class ClientRows:
    """One client's rows in a feature table, numbered in the first view.

    Under example-level privacy `numbers` seed each row's random draws (`example_numbers`), and `batches` are
    the places among the rows of each step's Poisson batch.
    """

    client: str
    rows: NDArray[np.int64]
    numbers: NDArray[np.uint64] | None = None
    batches: tuple[NDArray[np.int64], ...] = ()

    @property
    def first_row(self) -> int:
        """A row that padding may refer to."""
        return int(self.rows[0]) if len(self.rows) else 0
