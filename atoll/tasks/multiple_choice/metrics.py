"""How often the right choice is told: by its likelihood, by that for each byte, and in words.

Each counts questions: of `likelihood` [n, choices] the right choice is the first, and -inf stands where a
question has no more. One that doesn't fit is wrong by each. Sums add up over clients.
"""

from __future__ import annotations

import torch

from atoll.tasks.mean_metric import Mean


class LikelihoodAccuracy(Mean):
    """The share of questions whose right choice alone has the highest likelihood: of equals none is right."""

    higher_is_better = True

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions: `size` [n, choices] in bytes, `generated` and `fits` [n]."""
        self.score += (_is_first_alone(likelihood) & fits).sum()
        self.total += len(fits)


class ByteLikelihoodAccuracy(Mean):
    """As `LikelihoodAccuracy`, of the likelihood's log divided by the bytes of the choice's text."""

    higher_is_better = True

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions."""
        self.score += (_is_first_alone(likelihood / size.clamp_min(1)) & fits).sum()
        self.total += len(fits)


class GeneratedAccuracy(Mean):
    """The share of questions to which the model writes the right choice."""

    higher_is_better = True

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions: `generated` is the place of the choice that was written."""
        self.score += ((generated == 0) & fits).sum()
        self.total += len(fits)


class UnparsableRate(Mean):
    """The share of questions to which the model writes none of the choices."""

    higher_is_better = False

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions: `generated` is below 0 where no choice was written."""
        self.score += ((generated < 0) | ~fits).sum()
        self.total += len(fits)


def _is_first_alone(values: torch.Tensor) -> torch.Tensor:
    """Whether the first of each row [n, choices] is above all others, [n]."""
    return (values[:, :1] > values[:, 1:]).all(1)
