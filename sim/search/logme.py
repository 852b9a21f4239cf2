"""LogME: how well features could explain labels, before anything is trained.

You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STEPS = 200
CLOSE = 1e-6
"""Relative change of alpha / beta at which it is found."""


def logme(features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The largest log evidence of a Bayesian linear model, an example, mean over the classes.

    `features` F are [n, D], `labels` [n] whole numbers. For each class, y is 1 for its examples and
    0 for others, and with weights w ~ N(0, I / alpha) and y ~ N(F w, I / beta)

        log p(y | F) = n/2 log beta + D/2 log alpha - n/2 log 2 pi
                       - beta/2 |F m - y|^2 - alpha/2 m^T m - 1/2 log |A|,
        A = alpha I + beta F^T F,  m = beta A^-1 F^T y,

    is maximised over alpha and beta by MacKay's fixed point. Classes without an example are left out.
    """
    table = np.asarray(features, dtype=np.float64)
    left, values, _ = np.linalg.svd(table, full_matrices=False)
    known = np.unique(labels)
    evidence = [_evidence(left, values, (labels == c).astype(np.float64), table.shape[1]) for c in known]
    return float(np.mean(evidence)) / len(table)


def _evidence(
    left: NDArray[np.float64], values: NDArray[np.float64], y: NDArray[np.float64], width: int
) -> float:
    """The log evidence of one class at its best alpha and beta; F = left diag(values) right^T."""
    n, squares = len(y), values**2
    along = left.T @ y
    outside = max(float(y @ y - along @ along), 0.0)  # of y, what no weights reach
    tiny = np.finfo(np.float64).tiny
    alpha, beta = 1.0, 1.0
    for _ in range(STEPS):
        ratio = alpha / beta
        explained = float((squares / (squares + ratio)).sum())
        residual = float(((ratio * along / (squares + ratio)) ** 2).sum()) + outside
        weights = float(((values * along / (squares + ratio)) ** 2).sum())
        alpha, beta = explained / max(weights, tiny), max(n - explained, tiny) / max(residual, tiny)
        if abs(alpha / beta - ratio) <= CLOSE * ratio:
            break
    ratio = alpha / beta
    residual = float(((ratio * along / (squares + ratio)) ** 2).sum()) + outside
    weights = float(((values * along / (squares + ratio)) ** 2).sum())
    log_a = float(np.log(alpha + beta * squares).sum()) + (width - len(values)) * np.log(alpha)
    return float(
        n / 2 * np.log(beta) + width / 2 * np.log(alpha) - n / 2 * np.log(2 * np.pi)
        - beta / 2 * residual - alpha / 2 * weights - log_a / 2
    )  # fmt: skip
