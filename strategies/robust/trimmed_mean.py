"""Coordinate-wise trimmed mean (Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 2).

Of every number the f smallest and the f largest of the clients' are left out, and the merged delta has the
mean of the n - 2f between (the paper's beta is f / n). Needs n >= 2f + 1.
"""

from __future__ import annotations

import torch


def trimmed_mean(rows: torch.Tensor, hostile: int) -> torch.Tensor:
    """The mean of every column of the rows [clients, numbers] without `hostile` at each end, in float64.

    >>> trimmed_mean(torch.tensor([[-1e6], [1.0], [2.0], [1e6]], dtype=torch.float64), hostile=1).tolist()
    [1.5]
    """
    return rows.sort(dim=0).values[hostile : len(rows) - hostile].mean(dim=0)
