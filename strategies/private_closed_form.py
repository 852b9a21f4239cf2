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
"""L2 norm of all that one unit adds to the sums."""
BIAS = 0.3
"""The part b of z."""
SCALE = math.sqrt(1 - BIAS**2)
"""The part a of z: of its norm, what features have at most."""
ROUNDING_MARGIN = 1 - 1e-9
"""Examples are clipped to a norm this much smaller, for sums are rounded."""
FAILURE = 0.05
"""The probability with which noise exceeds the bound that the ridge is made of."""
TINY = 1e-12
"""The least ridge: features that never vary get weights of nothing."""
CERTAIN = 3.0
"""Deviations of its noise above which a class's count is taken for examples."""


def moment_shapes(kind: str, classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shape of each block, all in float64."""
    numbers = width + 1 if kind == "prototype" else (width + 1) * (width + 2) // 2
    return {"moments": (numbers,), "sums": (classes, width + 1)}


def bounded_sums(
    kind: str, features: torch.Tensor, classes: torch.Tensor, count: int, norm: float
) -> Tensors:
    """The two blocks, summed over features [n, width] of classes [n] of `count`, in float64.

    An example whose features aren't all finite counts as none.
    """
    sound = torch.isfinite(features).all(1)
    z = bounded(features[sound], norm)
    chosen = torch.nn.functional.one_hot(classes[sound], count).to(torch.float64)
    moments = z.square().sum(0) if kind == "prototype" else upper_triangle(z.T @ z)
    return {"moments": moments, "sums": chosen.T @ z}


def bounded(features: torch.Tensor, norm: float) -> torch.Tensor:
    """z of features [n, width], clipped to the norm, in float64, [n, width + 1]."""
    x = features.to(torch.float64) / norm
    # Norms of numbers whose squares are no floats any more.
    largest = x.abs().amax(1, keepdim=True).clamp_min(1)
    length = (x / largest).norm(dim=1, keepdim=True) * largest
    x = SCALE * x / length.clamp_min(1)
    return ROUNDING_MARGIN * torch.cat([x, torch.full((len(x), 1), BIAS, dtype=torch.float64)], 1)


def upper_triangle(matrix: torch.Tensor) -> torch.Tensor:
    """A symmetric [n, n] as [n (n + 1) / 2] of the same norm: off the diagonal times √2, row by row."""
    rows, columns = torch.triu_indices(len(matrix), len(matrix))
    weights = torch.where(rows == columns, 1.0, math.sqrt(2)).to(torch.float64)
    return matrix[rows, columns] * weights


def symmetric(triangle: torch.Tensor, width: int) -> torch.Tensor:
    """The symmetric [width, width] of which `upper_triangle` is made."""
    rows, columns = torch.triu_indices(width, width)
    weights = torch.where(rows == columns, 1.0, math.sqrt(0.5)).to(torch.float64)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    matrix[rows, columns] = triangle * weights
    matrix[columns, rows] = triangle * weights
    return matrix


def noise_bound(width: int, deviation: float) -> float:
    """What the spectral norm of the matrix noise [width, width] exceeds with probability `FAILURE` at most.

    On the diagonal it has the deviation, off it the deviation / √2, so that the expected square of the noise
    is (width + 1) / 2 deviation² times the identity, which is the variance in Tropp's bound.
    """
    return deviation * math.sqrt((width + 1) * math.log(2 * width / FAILURE))


def adaptive_ridge(gram: torch.Tensor, deviation: float) -> float:
    """AdaSSP's ridge for a noised sum of z zᵀ, [width, width]."""
    bound = noise_bound(len(gram), deviation)
    least = max(0.0, float(torch.linalg.eigvalsh(gram)[0]) - bound)
    return max(0.0, bound - least)


def noised_head(kind: str, total: Tensors, deviation: float, norm: float, ridge: float) -> Tensors:
    """The head of noised sums, in float32; every number's noise has that deviation.

    A ridge head's squared weights cost what AdaSSP says, or `ridge` as without noise where that is more; and
    so it is with the covariance of Gaussian classes.
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
    found = torch.linalg.solve(gram + cost * torch.eye(width, dtype=torch.float64), total["sums"].T).T
    return found[:, :-1] * SCALE / norm, found[:, -1] * BIAS


def _gaussian(
    total: Tensors, deviation: float, norm: float, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In z's own units first, whose features are `SCALE` / `norm` times those of the examples."""
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
    found: torch.Tensor = (vectors * values.clamp_min(0)) @ vectors.T
    return found


def _counts_and_sums(total: Tensors, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples of each class, [classes], and their z's sums, [classes, width]; 0 for what may be noise."""
    counts = total["sums"][:, -1] / BIAS
    seen = counts > CERTAIN * deviation / BIAS
    return counts.masked_fill(~seen, 0), total["sums"][:, :-1].masked_fill(~seen.unsqueeze(1), 0)


def _mean_variance(gram: torch.Tensor) -> float:
    """Of the features in z, times the number of examples; 0 where noise leaves none."""
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
