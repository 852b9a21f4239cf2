"""Perplexity and accuracy of next-token predictions: per token, and per byte, which suits any tokenizer.

All have sums in float64 that add up over clients, so a metric is that of all clients' tokens together.
"Surprise" is the negative log-probability of a token in nats.
"""

from __future__ import annotations

import math

import torch

from atoll.tasks.mean_metric import Mean


class Perplexity(Mean):
    """exp of the mean surprise per token."""

    higher_is_better = False

    def update(
        self, surprise: torch.Tensor, hit: torch.Tensor, real: torch.Tensor, size: torch.Tensor
    ) -> None:
        """Count tokens: `surprise`, `hit` and `real` are [n, learnt], `size` [n] is in bytes."""
        self.score += _sum(surprise, real)
        self.total += real.sum()

    def compute(self) -> torch.Tensor:
        return torch.exp(self.score / self.total)


class BytePerplexity(Mean):
    """exp of the mean surprise per byte of text."""

    higher_is_better = False

    def update(
        self, surprise: torch.Tensor, hit: torch.Tensor, real: torch.Tensor, size: torch.Tensor
    ) -> None:
        """Count bytes; the surprise of tokens without text, such as end tokens, counts as well."""
        self.score += _sum(surprise, real)
        self.total += size.sum()

    def compute(self) -> torch.Tensor:
        return torch.exp(self.score / self.total)


class BitsPerByte(BytePerplexity):
    """The mean surprise per byte of text, in bits."""

    def compute(self) -> torch.Tensor:
        return self.score / self.total / math.log(2)


class TokenAccuracy(Mean):
    """The share of tokens that are the network's most likely prediction."""

    higher_is_better = True

    def update(
        self, surprise: torch.Tensor, hit: torch.Tensor, real: torch.Tensor, size: torch.Tensor
    ) -> None:
        """Count tokens, as `Perplexity`."""
        self.score += _sum(hit, real)
        self.total += real.sum()


def _sum(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return (values.to(torch.float64) * real).sum()
