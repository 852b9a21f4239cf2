"""Reward margin and accuracy of preferences, with sums that add up over clients."""

from __future__ import annotations

import torch

from atoll.tasks.mean_metric import Mean


class RewardMargin(Mean):
    """The mean of the chosen completion's reward minus the rejected one's."""

    higher_is_better = True

    def update(self, rewards: torch.Tensor, real: torch.Tensor) -> None:
        """Count pairs: `rewards` [n, 2] of chosen and rejected; pairs with `real` [n] of 0 are left out."""
        margin = rewards[:, 0].to(torch.float64) - rewards[:, 1].to(torch.float64)
        self.score += (margin * real).sum()
        self.total += real.sum()


class PreferenceAccuracy(Mean):
    """The share of pairs in which the chosen completion has the higher reward; ties are wrong, as in TRL."""

    higher_is_better = True

    def update(self, rewards: torch.Tensor, real: torch.Tensor) -> None:
        """Count pairs, as `RewardMargin`."""
        self.score += ((rewards[:, 0] > rewards[:, 1]) * real).sum()
        self.total += real.sum()
