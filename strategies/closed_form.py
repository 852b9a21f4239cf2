"""Heads in closed form from sums over clients: class means, ridge regression, and Gaussian classes.

What a client sends adds up over clients, so the head is the one that all examples in one place would
give, whoever holds which. All are a linear layer on features as they are.

prototype  Snell et al. 2017, "Prototypical Networks for Few-shot Learning", equation 8: an output is
           minus the squared distance to the class's mean, here the mean over features, each in its
           deviation over all examples, without the term that all classes share.
ridge      Hoerl and Kennard 1970: least squares on one-hot classes, plus `ridge` times the sum of the
           weights' squares for every example, in units of the features' mean variance; the bias is free.
gaussian   Fisher 1936's discriminant, as Guan et al. 2025, "Capture Global Feature Statistics for One-Shot
           Federated Learning" (FedCGS), take it: features of class c are N(mu_c, S) with one covariance S of
           all classes, so the logarithm of its probability is, up to what all share, the linear
           mu_c' S^-1 x - mu_c' S^-1 mu_c / 2 + log(n_c / n). S has `ridge` times the features' mean
           variance within a class added to its diagonal, which the paper, whose S is regular, leaves out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from atoll.protocol.tensors import Tensors

ABSENT = -1e4
"""The bias of a class without examples at any client, so that it is never predicted."""


def prototype_statistics(features: torch.Tensor, classes: torch.Tensor, count: int) -> Tensors:
    """Float64 sums of features [n, width] by class, and of their squares; `classes` [n] are below `count`."""
    x = features.to(torch.float64)
    chosen = torch.nn.functional.one_hot(classes, count).to(torch.float64)
    return {"counts": chosen.sum(0), "sums": chosen.T @ x, "squares": x.square().sum(0)}


def ridge_statistics(features: torch.Tensor, classes: torch.Tensor, count: int) -> Tensors:
    """Float64 X'X, X'Y and class counts of features [n, width]; `classes` [n] are below `count`."""
    x = features.to(torch.float64)
    chosen = torch.nn.functional.one_hot(classes, count).to(torch.float64)
    return {"counts": chosen.sum(0), "sums": chosen.T @ x, "gram": x.T @ x}


STATISTICS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], Tensors]] = {
    "prototype": prototype_statistics,
    "ridge": ridge_statistics,
    "gaussian": ridge_statistics,
}


def prototype_head(total: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [classes, width], bias [classes]) of the nearest class mean, in float64."""
    mean, deviation = _scale(total, total["squares"])
    centres = (class_means(total["counts"], total["sums"]) - mean) / deviation
    width = len(mean)
    weights = 2 * centres / deviation / width
    bias = -centres.square().sum(1) / width - weights @ mean
    absent = total["counts"] == 0
    return weights.masked_fill(absent.unsqueeze(1), 0), bias.masked_fill(absent, ABSENT)


def ridge_head(total: Tensors, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [classes, width], bias [classes]) of ridge regression on one-hot classes, in float64."""
    count = total["counts"].sum()
    mean, shares = total["sums"].sum(0) / count, total["counts"] / count
    covariance = total["gram"] / count - mean.unsqueeze(1) * mean
    moments = total["sums"] / count - shares.unsqueeze(1) * mean
    # Where features never vary, as those of a single example, weights are nothing whatever they cost.
    cost = ridge * (covariance.diagonal().clamp_min(0).mean() or 1.0)
    weights = torch.linalg.solve(covariance + cost * torch.eye(len(mean), dtype=torch.float64), moments.T).T
    return weights, shares - weights @ mean


def gaussian_head(total: Tensors, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [classes, width], bias [classes]) of Gaussian classes of one covariance, in float64."""
    counts, count = total["counts"], total["counts"].sum()
    means = class_means(counts, total["sums"])
    within = (total["gram"] - means.T @ total["sums"]) / count
    cost = ridge * (within.diagonal().clamp_min(0).mean() or 1.0)
    weights = torch.linalg.solve(within + cost * torch.eye(len(within), dtype=torch.float64), means.T).T
    bias = (counts / count).log() - (weights * means).sum(1) / 2
    absent = counts == 0
    return weights.masked_fill(absent.unsqueeze(1), 0), bias.masked_fill(absent, ABSENT)


def class_means(counts: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Mean features by class, [classes, width]; zeros for a class without examples. Counts may be below 1."""
    return sums / torch.where(counts > 0, counts, 1).unsqueeze(1)


def _scale(total: Tensors, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, deviation) of every feature, [width] each; the deviation of a constant feature counts as 1."""
    count = total["counts"].sum()
    mean = total["sums"].sum(0) / count
    raw = squares / count
    # What is left of equal numbers by rounding is no deviation.
    variance = torch.where(raw - mean.square() > 1e-12 * raw, raw - mean.square(), torch.ones_like(mean))
    return mean, variance.sqrt()


def head_of(kind: str, total: Tensors, ridge: float) -> Tensors:
    """The head's tensors from summed statistics, named as the model's, in float32."""
    match kind:
        case "prototype":
            weights, bias = prototype_head(total)
        case "gaussian":
            weights, bias = gaussian_head(total, ridge)
        case _:
            weights, bias = ridge_head(total, ridge)
    return {"head.weight": weights.to(torch.float32), "head.bias": bias.to(torch.float32)}
