"""Losses of several predictions an example, of which some have no target."""

from __future__ import annotations

import torch
from torch import nn


def surprise(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy at places that have a target: the mean over each example's, then over examples.

    `outputs` [n, places, classes], `targets` [n, places], negative where there is none.
    """
    known = targets.clamp(0, outputs.shape[2] - 1)
    each = nn.functional.cross_entropy(outputs.transpose(1, 2), known, reduction="none")
    real = targets >= 0
    return ((each * real).sum(1) / real.sum(1).clamp_min(1)).mean()
