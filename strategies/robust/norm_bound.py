"""Norm bounding (Sun et al. 2019, "Can You Really Backdoor Federated Learning?").

The merged delta is 1 / n sum_i x_i / max(1, ||x_i|| / M): no client moves the model by more than M / n, where
M is `clipping_norm`. A hostile client's bounded influence remains in the mean, and without noise no privacy
is promised.
"""

from __future__ import annotations

import torch


def norm_bound(rows: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    """The mean [numbers] of rows [clients, numbers] after clipping each to `clipping_norm`, in float64.

    >>> norm_bound(torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64), clipping_norm=2.5).tolist()
    [0.75, 1.5]
    """
    return shortened(rows, clipping_norm).mean(dim=0)


def shortened(rows: torch.Tensor, norm: float) -> torch.Tensor:
    """The rows [clients, numbers], each scaled down to L2 norm `norm` if it is longer."""
    excess: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True) / norm
    return rows / excess.clamp_min(1)
