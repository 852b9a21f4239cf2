"""Bulyan over Krum (El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning").

Of n clients f may be hostile, n >= 4f + 3. Krum chooses theta = n - 2f rows one after the other, each among
those that are left. Every number of the merged delta is then the mean of the beta = theta - 2f chosen rows'
numbers that are nearest to their median, so that no single number of a chosen row can stray far.
"""

from __future__ import annotations

import torch

from atoll.strategies.robust.coordinate_median import coordinate_median
from atoll.strategies.robust.krum import krum_scores
from atoll.strategies.robust.nearest_neighbour_mixing import distances


def bulyan(rows: torch.Tensor, hostile: int) -> torch.Tensor:
    """Bulyan's merged row [numbers] of rows [clients, numbers] with at most `hostile` bad ones, in float64.

    >>> line = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [1e6]], dtype=torch.float64)
    >>> bulyan(line, hostile=1).tolist()
    [3.0]
    """
    chosen = rows[krum_choice(rows, hostile, count=len(rows) - 2 * hostile)]
    order = (chosen - coordinate_median(chosen)).abs().argsort(dim=0, stable=True)
    return chosen.gather(0, order[: len(chosen) - 2 * hostile]).mean(dim=0)


def krum_choice(rows: torch.Tensor, hostile: int, count: int) -> list[int]:
    """The sorted places of `count` rows that Krum chooses one after the other among the remaining rows."""
    squares, left = distances(rows).square(), list(range(len(rows)))
    for _ in range(count):
        scores = krum_scores(squares[left][:, left], hostile)
        left.pop(int(scores.argsort(stable=True)[0]))
    return sorted(set(range(len(rows))) - set(left))
