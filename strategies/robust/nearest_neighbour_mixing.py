"""Nearest-neighbour mixing (Allouah et al. 2023, "Fixing by Mixing"), before any of the rules.

Of n clients f may be hostile. Each x_i becomes the mean of the n - f rows nearest to it in L2, itself among
them: y_i = 1 / (n - f) sum_{j in N_i} x_j. Honest clients whose data differ come closer to each other, and a
rule that compares rows then errs less.
"""

from __future__ import annotations

import torch


def mixed(rows: torch.Tensor, hostile: int) -> torch.Tensor:
    """Each of the rows [clients, numbers] as the mean of the clients - `hostile` nearest, in float64.

    Of rows at one distance those of the first clients count.

    >>> mixed(torch.tensor([[1.0], [2.0], [9.0]], dtype=torch.float64), hostile=1).tolist()
    [[1.5], [1.5], [5.5]]
    """
    nearest = distances(rows).argsort(dim=1, stable=True)[:, : len(rows) - hostile]
    return torch.stack([rows[chosen].mean(dim=0) for chosen in nearest])


def distances(rows: torch.Tensor) -> torch.Tensor:
    """The L2 distances of all pairs of rows, [clients, clients], from differences, to avoid cancellation."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
