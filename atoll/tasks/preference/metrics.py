"""How much better than the rejected completion the chosen one is held to be; sums add up over clients."""

from __future__ import annotations

import torch

from atoll.tasks.mean_metric import Mean


class RewardMargin(Mean):
    """The mean of the chosen one's reward less the rejected one's."""

    higher_is_better = True

    def update(self, rewards: torch.Tensor, real: torch.Tensor) -> None:
        """Count pairs: `rewards` [n, 2] of chosen and rejected, `real` [n] where both are there."""
        margin = rewards[:, 0].to(torch.float64) - rewards[:, 1].to(torch.float64)
        self.score += (margin * real).sum()
        self.total += real.sum()


class PreferenceAccuracy(Mean):
    """The share of pairs whose chosen one has the higher reward; equal ones are wrong, as with TRL."""

    higher_is_better = True

    def update(self, rewards: torch.Tensor, real: torch.Tensor) -> None:
        """Count pairs, as `RewardMargin`."""
        self.score += ((rewards[:, 0] > rewards[:, 1]) * real).sum()
        self.total += real.sum()
