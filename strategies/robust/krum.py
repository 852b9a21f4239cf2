"""Krum and Multi-Krum (Blanchard et al. 2017, "Machine Learning with Adversaries").

Of n clients f may be hostile, n >= 2f + 3. The score of x_i is the sum of squared distances to the n - f - 2
other rows nearest to it, or to one. Krum takes the row of the least score; Multi-Krum the mean of the m rows
of least score, n - f where `selected` says nothing else. Of equal scores the first client's counts.
"""

from __future__ import annotations

import torch

from atoll.strategies.robust.nearest_neighbour_mixing import distances


def krum_scores(squares: torch.Tensor, hostile: int) -> torch.Tensor:
    """Each client's Krum score [clients], given all squared distances [clients, clients]."""
    others = squares.clone().fill_diagonal_(torch.inf).sort(dim=1).values
    return others[:, : max(1, len(squares) - hostile - 2)].sum(dim=1)


def krum(rows: torch.Tensor, hostile: int) -> torch.Tensor:
    """The row [numbers] whose neighbours are nearest, of rows [clients, numbers] in float64.

    >>> line = torch.tensor([[1.0], [2.0], [2.5], [9.0], [-1e6]], dtype=torch.float64)
    >>> krum(line, hostile=1).tolist()
    [2.0]
    """
    return rows[krum_scores(distances(rows).square(), hostile).argsort(stable=True)[0]]


def multi_krum(rows: torch.Tensor, hostile: int, selected: int | None = None) -> torch.Tensor:
    """The mean [numbers] of the rows with the least scores, of rows [clients, numbers] in float64.

    >>> line = torch.tensor([[1.0], [2.0], [2.5], [9.0], [-1e6]], dtype=torch.float64)
    >>> multi_krum(line, hostile=1, selected=2).tolist()
    [2.25]
    """
    best = krum_scores(distances(rows).square(), hostile).argsort(stable=True)
    return rows[best[: selected or len(rows) - hostile]].mean(dim=0)
