"""What hostile clients send instead of their deltas: functions of rows of numbers, in float64.

A row is one client's delta, its tensors one behind the other. The clients know what the honest ones of the
round send, as the papers assume; honest rows are [clients, numbers].
"""

from __future__ import annotations

import torch


def sign_flip(update: torch.Tensor, scale: float) -> torch.Tensor:
    """Minus `scale` times the client's own honest row [numbers] (Li et al. 2019, RSA)."""
    return -scale * update


def inner_product(honest: torch.Tensor, scale: float) -> torch.Tensor:
    """Minus `scale` times the honest mean (Xie, Koyejo and Gupta 2020, "Fall of Empires")."""
    return -scale * honest.mean(dim=0)


def alie(honest: torch.Tensor, scale: float) -> torch.Tensor:
    """The honest mean plus `scale` standard deviations of every number: near enough to be taken for honest.

    Baruch et al. 2019, "A Little Is Enough".
    """
    return honest.mean(dim=0) + scale * _deviations(honest)


def min_max(honest: torch.Tensor) -> torch.Tensor:
    """As far from the honest mean as two honest rows are apart (Shejwalkar and Houmansadr 2021, "Min-Max").

    mean - gamma std, with the largest gamma at which no honest row is further from it than the two most
    distant honest rows are from each other. The paper searches gamma; here it is the smallest root of
    ||gamma p + d_i||^2 = D^2 over i, with p = -std, d_i = mean - x_i and D the largest distance.

    >>> min_max(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    tensor([0.], dtype=torch.float64)
    """
    mean, direction = honest.mean(dim=0), -_deviations(honest)
    square = direction.square().sum()
    if square == 0:
        return mean
    offsets = mean - honest
    largest = torch.pdist(honest).max().square()
    along = offsets @ direction
    inside = (along.square() + square * (largest - offsets.square().sum(dim=1))).clamp(min=0)
    gamma = ((-along + inside.sqrt()) / square).min()
    return mean + gamma * direction


def gaussian(like: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Independent normal numbers of standard deviation `scale`, as many as a row has."""
    return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)


def _deviations(honest: torch.Tensor) -> torch.Tensor:
    """Standard deviation of every number over the rows; zero where there is only one row."""
    return honest.std(dim=0) if len(honest) > 1 else torch.zeros_like(honest[0])
