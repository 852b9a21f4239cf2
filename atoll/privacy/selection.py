"""What it costs to pick the best of several private runs: every run's result was looked at.

Papernot and Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy": where the number of
runs is itself drawn at random, and nothing but the best run is released, the price is little above that
of one run. Where it is fixed, as in a full grid, all runs are charged, one on top of the other.

The unit, the neighbours and the sampling are those of the runs' releases. Whatever the best run is
judged by must be public (a test set that isn't protected) or noised and charged with the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atoll.privacy.accounting import UNREACHABLE, Composition, compose, epsilon, rdp_accountant


@dataclass(frozen=True)
class Poisson:
    """So many runs on average, perhaps none: what comes out then depends on nobody's data."""

    mean: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 1):
            raise ValueError(f"mean must be finite and >= 1, got {self.mean}")


@dataclass(frozen=True)
class TruncatedNegativeBinomial:
    """At least one run. A shape (eta) of 1 is the geometric distribution, of 0 the logarithmic one.

    The smaller `gamma`, the more runs; with gamma = 1 there is exactly one.
    """

    shape: float
    gamma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shape) and self.shape > -1):
            raise ValueError(f"shape must be finite and > -1, got {self.shape}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}")

    @property
    def mean(self) -> float:
        """Runs on average (definition 1 of the paper).

        >>> round(TruncatedNegativeBinomial(shape=1, gamma=0.1).mean, 6)
        10.0
        """
        shape, gamma = self.shape, self.gamma
        if gamma == 1:
            return 1.0
        if shape == 0:
            return (1 / gamma - 1) / math.log(1 / gamma)
        return float(shape * (1 - gamma) / (gamma * (1 - gamma**shape)))


Repetitions = Poisson | TruncatedNegativeBinomial


@dataclass(frozen=True)
class Curve:
    """Renyi divergence of a mechanism at each order: bounds, infinite where there is none."""

    orders: NDArray[np.float64]
    divergence: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.orders.shape != self.divergence.shape or not bool((self.orders > 1).all()):
            raise ValueError("a curve needs orders above 1, and a divergence for each")

    @classmethod
    def of(cls, spent: Composition) -> Curve:
        """Of all those releases together."""
        accountant = rdp_accountant(spent)
        # The accountant tells epsilon alone; what it adds up is only in these two.
        return cls(np.array(accountant._orders, dtype=np.float64), np.array(accountant._rdp))

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon that follows; never negative, infinite if vacuous."""
        from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

        value, _ = compute_epsilon(self.orders, np.maximum(self.divergence, 0), delta)
        return math.inf if math.isnan(value) or value >= UNREACHABLE else max(float(value), 0.0)


def worst(curves: Sequence[Curve]) -> Curve:
    """A bound for a run that is one of several, chosen by a coin that is public."""
    return Curve(curves[0].orders, np.max([curve.divergence for curve in curves], axis=0))


def best_of(curve: Curve, repetitions: Repetitions) -> Curve:
    """The curve of releasing the best of so many runs, each with the given curve, and nothing else."""
    if isinstance(repetitions, Poisson):
        return _best_of_poisson(curve, repetitions.mean)
    if repetitions.gamma == 1:
        return curve
    return _best_of_negative_binomial(curve, repetitions)


def _best_of_negative_binomial(curve: Curve, repetitions: TruncatedNegativeBinomial) -> Curve:
    """Theorem 2. Its second order may be any from 1 on; at 1 nothing but the logarithm is left."""
    log, orders = math.log(1 / repetitions.gamma), curve.orders
    second = (1 - 1 / orders) * curve.divergence + log / orders
    constant = (1 + repetitions.shape) * min(float(second.min()), log)
    return Curve(orders, curve.divergence + constant + math.log(repetitions.mean) / (orders - 1))


def _best_of_poisson(curve: Curve, mean: float) -> Curve:
    """Theorem 6: at each order with the delta that the run has at epsilon = log(1 + 1 / (order - 1))."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    orders = curve.orders
    deltas = [
        compute_delta(orders, curve.divergence, math.log1p(1 / (order - 1)))[0] for order in orders.tolist()
    ]
    return Curve(orders, curve.divergence + mean * np.array(deltas) + math.log(mean) / (orders - 1))


def epsilon_of_best(trials: Sequence[Composition], delta: float, repetitions: Repetitions) -> float:
    """Epsilon of the best of a random number of runs, each one of these trials, drawn at random.

    Raises:
        ValueError: there are no trials.
    """
    if not trials:
        raise ValueError("expected at least one trial")
    distinct = {tuple(sorted(spent.items())): spent for spent in trials}
    curve = worst([Curve.of(spent) for spent in distinct.values()])
    return best_of(curve, repetitions).epsilon(delta)


def epsilon_of_all(trials: Sequence[Composition], delta: float) -> float:
    """Epsilon of all the trials together: whoever has seen every result may pick as they like."""
    return epsilon(compose(*trials), delta)
