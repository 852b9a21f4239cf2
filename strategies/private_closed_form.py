"""Closed-form heads from noised sums: what one unit can change of them, and heads that allow for the noise.

An example with features x and class k becomes z = (a x / norm, b) with a² + b² = 1, x being clipped to
`norm` first, so that |z| <= 1; b stands for the bias. Two blocks of numbers add up over examples:

moments  of ridge and gaussian the upper triangle of z zᵀ with its off-diagonal numbers times √2. The
         vector's L2 norm is then the matrix's Frobenius norm, |z|² <= 1. (The bare upper triangle has the
         same greatest norm, reached by a z along one axis; the factor √2 costs nothing and halves the
         variance of the noise off the diagonal.) Of prototypes z² by number, whose norm is at most
         |z|² <= 1 too.
sums     z in the row of its class k: norm |z| <= 1.

Both together have the norm √(|z|⁴ + |z|²) <= √2 = `SENSITIVITY`: by so much one example, added or removed,
moves an exact sum. A client that is the unit sends the mean over its examples, which by convexity has no
greater norm.

ridge      AdaSSP (Wang 2018, "Revisiting differentially private linear regression", algorithm 2): ridge
           max(0, t - λ), with t a bound on the spectral norm of the noise and λ a lower bound of the least
           eigenvalue. Its λ is a release of its own, of a number that is no sum over clients; here it is the
           noised matrix's least eigenvalue minus t (Weyl's inequality), which costs nothing. t is Tropp's
           for this noise (2012, "User-friendly tail bounds", theorem 4.1).
gaussian   the same ridge on the sum of squares within classes, S times the number of examples, for the noise
           in it is the same matrix; what is smaller than its noise counts as nothing, as below.
prototype  class means and deviations as without noise; what is smaller than its noise counts as nothing.
"""

from __future__ import annotations

import math

import torch

from atoll.protocol.tensors import Tensors
from atoll.strategies.closed_form import ABSENT, class_means, gaussian_head, prototype_head

SENSITIVITY = math.sqrt(2)
"""The largest L2 norm of one unit's contribution to the sums."""
BIAS = 0.3
"""The b of z = (a x / norm, b)."""
SCALE = math.sqrt(1 - BIAS**2)
"""The a of z = (a x / norm, b): the largest norm of the features' part of z."""
ROUNDING_MARGIN = 1 - 1e-9
"""The factor by which the clipping norm is reduced, to allow for the rounding of sums."""
FAILURE = 0.05
"""The probability with which noise exceeds the bound from which the ridge follows."""
TINY = 1e-12
"""The least ridge, with which constant features get zero weights."""
CERTAIN = 3.0
"""A class's count is taken as real if it exceeds this many deviations of its noise."""


def moment_shapes(kind: str, classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shape of each block of sums, by name; all are float64."""
    numbers = width + 1 if kind == "prototype" else (width + 1) * (width + 2) // 2
    return {"moments": (numbers,), "sums": (classes, width + 1)}


def bounded_sums(
    kind: str, features: torch.Tensor, classes: torch.Tensor, count: int, norm: float
) -> Tensors:
    """The two blocks of sums over features [n, width]; `classes` [n] are below `count`. Float64.

    An example whose features aren't all finite is left out.
    """
    sound = torch.isfinite(features).all(1)
    z = bounded(features[sound], norm)
    chosen = torch.nn.functional.one_hot(classes[sound], count).to(torch.float64)
    moments = z.square().sum(0) if kind == "prototype" else upper_triangle(z.T @ z)
    return {"moments": moments, "sums": chosen.T @ z}


def bounded(features: torch.Tensor, norm: float) -> torch.Tensor:
    """z [n, width + 1] of features [n, width] that are first clipped to `norm`, in float64."""
    x = features.to(torch.float64) / norm
    # Norms of numbers whose squares are no floats any more.
    largest = x.abs().amax(1, keepdim=True).clamp_min(1)
    length = (x / largest).norm(dim=1, keepdim=True) * largest
    x = SCALE * x / length.clamp_min(1)
    return ROUNDING_MARGIN * torch.cat([x, torch.full((len(x), 1), BIAS, dtype=torch.float64)], 1)


def upper_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle [n (n + 1) / 2] of a symmetric [n, n], row by row; off-diagonal numbers times √2."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix))
    weights = torch.where(rows == columns, 1.0, math.sqrt(2)).to(torch.float64)
    return matrix[rows, columns] * weights


def symmetric(triangle: torch.Tensor, width: int) -> torch.Tensor:
    """The symmetric matrix [width, width] whose `upper_triangle` is given."""
    rows, columns = torch.triu_indices(width, width)
    weights = torch.where(rows == columns, 1.0, math.sqrt(0.5)).to(torch.float64)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    matrix[rows, columns] = triangle * weights
    matrix[columns, rows] = triangle * weights
    return matrix


def noise_bound(width: int, deviation: float) -> float:
    """A bound that the spectral norm of the noise matrix [width, width] exceeds with at most `FAILURE`.

    The noise has deviation `deviation` on the diagonal and `deviation` / √2 off it, so its expected square is
    (width + 1) / 2 deviation² times the identity, which is the variance in Tropp's bound.
    """
    return deviation * math.sqrt((width + 1) * math.log(2 * width / FAILURE))


def adaptive_ridge(gram: torch.Tensor, deviation: float) -> float:
    """AdaSSP's ridge for a noised sum of z zᵀ, `gram` [width, width]."""
    bound = noise_bound(len(gram), deviation)
    least = max(0.0, float(torch.linalg.eigvalsh(gram)[0]) - bound)
    return max(0.0, bound - least)


def noised_head(kind: str, total: Tensors, deviation: float, norm: float, ridge: float) -> Tensors:
    """The head's tensors from noised sums, in float32; every number's noise has the same `deviation`.

    Ridge heads, and the covariance of Gaussian classes, use the larger of AdaSSP's ridge and `ridge`.
    """
    match kind:
        case "prototype":
            weights, bias = _prototypes(total, deviation, norm)
        case "gaussian":
            weights, bias = _gaussian(total, deviation, norm, ridge)
        case _:
            weights, bias = _ridge(total, deviation, norm, ridge)
    return {"head.weight": weights.to(torch.float32), "head.bias": bias.to(torch.float32)}


def _ridge(total: Tensors, deviation: float, norm: float, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    width = total["sums"].shape[1]
    gram = symmetric(total["moments"], width)
    cost = max(adaptive_ridge(gram, deviation), ridge * _mean_variance(gram), TINY)
    solution = torch.linalg.solve(gram + cost * torch.eye(width, dtype=torch.float64), total["sums"].T).T
    return solution[:, :-1] * SCALE / norm, solution[:, -1] * BIAS


def _gaussian(
    total: Tensors, deviation: float, norm: float, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head of Gaussian classes, computed in z's units: `SCALE` / `norm` times those of the features."""
    counts, sums = _counts_and_sums(total, deviation)
    if not bool((counts > 0).any()):
        return torch.zeros_like(sums), torch.full_like(counts, ABSENT)
    gram = symmetric(total["moments"], total["sums"].shape[1])
    cost = max(adaptive_ridge(gram, deviation), TINY) * torch.eye(len(gram) - 1, dtype=torch.float64)
    between = class_means(counts, sums).T @ sums
    within = _nearest_covariance(gram[:-1, :-1] - between) + cost
    weights, bias = gaussian_head({"counts": counts, "sums": sums, "gram": within + between}, ridge)
    return weights * SCALE / norm, bias


def _nearest_covariance(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix without its negative eigenvalues, which noise alone can make."""
    values, vectors = torch.linalg.eigh(matrix)
    nearest: torch.Tensor = (vectors * values.clamp_min(0)) @ vectors.T
    return nearest


def _counts_and_sums(total: Tensors, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(examples by class [classes], sums of z by class [classes, width]); 0 where it may be noise alone."""
    counts = total["sums"][:, -1] / BIAS
    seen = counts > CERTAIN * deviation / BIAS
    return counts.masked_fill(~seen, 0), total["sums"][:, :-1].masked_fill(~seen.unsqueeze(1), 0)


def _mean_variance(gram: torch.Tensor) -> float:
    """The mean variance of the features in z, times the number of examples; 0 where noise hides it."""
    count = max(float(gram[-1, -1]) / BIAS**2, 1.0)
    mean = gram[-1, :-1] / (BIAS * count)
    return max(0.0, float((gram.diagonal()[:-1] - count * mean.square()).mean()))


def _prototypes(total: Tensors, deviation: float, norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    counts, sums = _counts_and_sums(total, deviation)
    sums, count = sums * norm / SCALE, counts.sum()
    if not bool((counts > 0).any()):
        return torch.zeros_like(sums), torch.full_like(counts, ABSENT)
    square = (norm / SCALE) ** 2
    mean = sums.sum(0) / count
    variance = total["moments"][:-1] * square / count - mean.square()
    squares = (variance.clamp_min(deviation * square / float(count)) + mean.square()) * count
    return prototype_head({"counts": counts, "sums": sums, "squares": squares})
