"""Accuracy of multiple choice: by likelihood, by likelihood per byte, and by the written answer.

All count questions, with sums that add up over clients. In `likelihood` [n, choices] the right choice is the
first, and -inf fills up rows with fewer choices. A question too long for the model (`fits`) counts as wrong.
"""

from __future__ import annotations

import torch

from atoll.tasks.mean_metric import Mean


class LikelihoodAccuracy(Mean):
    """The share of questions whose right choice has a higher likelihood than all others; ties are wrong."""

    higher_is_better = True

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions; `size` [n, choices] is in bytes, `generated` and `fits` are [n]."""
        self.score += (_is_first_alone(likelihood) & fits).sum()
        self.total += len(fits)


class ByteLikelihoodAccuracy(Mean):
    """As `LikelihoodAccuracy`, with the log-likelihood divided by the bytes of the choice's text."""

    higher_is_better = True

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions."""
        self.score += (_is_first_alone(likelihood / size.clamp_min(1)) & fits).sum()
        self.total += len(fits)


class GeneratedAccuracy(Mean):
    """The share of questions for which the model writes the right choice."""

    higher_is_better = True

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions; `generated` is the index of the choice that was written, 0 for the right one."""
        self.score += ((generated == 0) & fits).sum()
        self.total += len(fits)


class UnparsableRate(Mean):
    """The share of questions for which the model writes none of the choices."""

    higher_is_better = False

    def update(
        self, likelihood: torch.Tensor, size: torch.Tensor, generated: torch.Tensor, fits: torch.Tensor
    ) -> None:
        """Count questions; `generated` is below 0 where no choice was written."""
        self.score += ((generated < 0) | ~fits).sum()
        self.total += len(fits)


def _is_first_alone(values: torch.Tensor) -> torch.Tensor:
    """Whether the first value of each row [n, choices] is greater than all others, [n]."""
    return (values[:, :1] > values[:, 1:]).all(1)
