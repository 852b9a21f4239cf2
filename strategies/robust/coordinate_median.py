"""Coordinate-wise median (Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 1).

Every number of the merged delta is the median of the clients' numbers; of an even count it is the mean of the
two in the middle. It holds while fewer than half of the clients are hostile (n >= 2f + 1).
"""

from __future__ import annotations

import torch


def coordinate_median(rows: torch.Tensor) -> torch.Tensor:
    """The median of every column of the rows [clients, numbers], in float64.

    >>> coordinate_median(torch.tensor([[1.0], [2.0], [3.0], [1e6]], dtype=torch.float64)).tolist()
    [2.5]
    """
    ordered, count = rows.sort(dim=0).values, len(rows)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
