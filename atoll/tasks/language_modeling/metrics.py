"""How well tokens are foretold: by token and, whatever the tokenizer, by byte of the text they write.

Each adds up sums over clients, in float64: then the metric is that of all tokens together.
"""

from __future__ import annotations

import math

import torch

from atoll.tasks.mean_metric import Mean


class Perplexity(Mean):
    """exp of the mean surprise of a token, in nats."""

    higher_is_better = False

    def update(
        self, surprise: torch.Tensor, hit: torch.Tensor, real: torch.Tensor, size: torch.Tensor
    ) -> None:
        """Count tokens: `surprise`, `hit` and `real` are [n, places], `size` [n] in bytes."""
        self.score += _sum(surprise, real)
        self.total += real.sum()

    def compute(self) -> torch.Tensor:
        return torch.exp(self.score / self.total)


class BytePerplexity(Mean):
    """exp of the surprise that a byte of the text costs in the mean, in nats."""

    higher_is_better = False

    def update(
        self, surprise: torch.Tensor, hit: torch.Tensor, real: torch.Tensor, size: torch.Tensor
    ) -> None:
        """Count bytes; the surprise of tokens that write none is the text's too."""
        self.score += _sum(surprise, real)
        self.total += size.sum()

    def compute(self) -> torch.Tensor:
        return torch.exp(self.score / self.total)


class BitsPerByte(BytePerplexity):
    """log2 of the perplexity of a byte."""

    def compute(self) -> torch.Tensor:
        return self.score / self.total / math.log(2)


class TokenAccuracy(Mean):
    """The share of tokens that are the likeliest ones after those before them."""

    higher_is_better = True

    def update(
        self, surprise: torch.Tensor, hit: torch.Tensor, real: torch.Tensor, size: torch.Tensor
    ) -> None:
        """Count tokens."""
        self.score += _sum(hit, real)
        self.total += real.sum()


def _sum(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return (values.to(torch.float64) * real).sum()
