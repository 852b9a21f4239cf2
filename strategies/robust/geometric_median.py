"""Geometric median by smoothed Weiszfeld steps (Pillutla et al. 2022, "Robust Aggregation").

The merged delta is near the point z with the least sum of distances to the clients' x_i. Each of R
`iterations` takes z <- sum_i b_i x_i / sum_i b_i with b_i = 1 / max(nu, ||x_i - z||); nu (`smoothing`) keeps
a weight finite where z meets a client. Holds while fewer than half are hostile.

The first z is the median of every number. From z = 0, where the paper begins, one client that sends zeros
holds z for as long as R is below 1 / nu: its weight there is 1 / nu.
"""

from __future__ import annotations

import torch

from atoll.strategies.robust.coordinate_median import coordinate_median


def geometric_median(rows: torch.Tensor, smoothing: float, iterations: int) -> torch.Tensor:
    """A point [numbers] with nearly the least sum of distances to the rows [clients, numbers], in float64.

    >>> line = torch.tensor([[1.0], [1.0], [1e6]], dtype=torch.float64)
    >>> round(geometric_median(line, smoothing=1e-6, iterations=20).item(), 3)
    1.0
    """
    point = coordinate_median(rows)
    for _ in range(iterations):
        weights = 1 / torch.linalg.vector_norm(rows - point, dim=1).clamp_min(smoothing)
        point = (weights @ rows) / weights.sum()
    return point
