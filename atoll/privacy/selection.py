"""The privacy cost of choosing the best of several private runs.

Papernot and Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy": if the number of runs is
itself drawn at random, and only the best run is released, the cost is little above that of one run. If it is
fixed, as in a full grid, the costs of all runs add up.

Unit, neighbouring relation and sampling are those of the runs' releases. The measure by which the best run is
chosen must be public (a test set that isn't protected), or noised and charged with the run.
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
    """A Poisson number of runs with this mean; if there are none, the result depends on no data."""

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
        """The mean number of runs (definition 1 of the paper).

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
    """Upper bounds of a mechanism's Renyi divergence at each order; infinite where there is no bound."""

    orders: NDArray[np.float64]
    divergence: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.orders.shape != self.divergence.shape or not bool((self.orders > 1).all()):
            raise ValueError("a curve needs orders above 1, and a divergence for each")

    @classmethod
    def of(cls, spent: Composition) -> Curve:
        """The curve of all these releases together."""
        accountant = rdp_accountant(spent)
        # The accountant tells epsilon alone; what it adds up is only in these two.
        return cls(np.array(accountant._orders, dtype=np.float64), np.array(accountant._rdp))

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon at `delta` that follows; at least 0, and infinite above `UNREACHABLE`."""
        from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

        # Of a divergence that is no number dp-accounting makes an epsilon of 0.
        divergence = np.where(np.isnan(self.divergence), np.inf, np.maximum(self.divergence, 0))
        value, _ = compute_epsilon(self.orders, divergence, delta)
        return math.inf if value >= UNREACHABLE else max(float(value), 0.0)


def worst(curves: Sequence[Curve]) -> Curve:
    """A bound for one of several mechanisms, chosen at random by a public draw: the maximum at each order."""
    return Curve(curves[0].orders, np.max([curve.divergence for curve in curves], axis=0))


def best_of(curve: Curve, repetitions: Repetitions) -> Curve:
    """The curve of releasing only the best of a random number of runs, each with the given curve."""
    if isinstance(repetitions, Poisson):
        return _best_of_poisson(curve, repetitions.mean)
    if repetitions.gamma == 1:
        return curve
    return _best_of_negative_binomial(curve, repetitions)


def _best_of_negative_binomial(curve: Curve, repetitions: TruncatedNegativeBinomial) -> Curve:
    """The paper's theorem 2; its second order may be any from 1 on, and at 1 only the logarithm remains."""
    log, orders = math.log(1 / repetitions.gamma), curve.orders
    second = (1 - 1 / orders) * curve.divergence + log / orders
    constant = (1 + repetitions.shape) * min(float(second.min()), log)
    return Curve(orders, curve.divergence + constant + math.log(repetitions.mean) / (orders - 1))


def _best_of_poisson(curve: Curve, mean: float) -> Curve:
    """The paper's theorem 6, at each order with the run's delta at epsilon = log(1 + 1 / (order - 1))."""
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    orders = curve.orders
    deltas = [
        compute_delta(orders, curve.divergence, math.log1p(1 / (order - 1)))[0] for order in orders.tolist()
    ]
    return Curve(orders, curve.divergence + mean * np.array(deltas) + math.log(mean) / (orders - 1))


def epsilon_of_best(trials: Sequence[Composition], delta: float, repetitions: Repetitions) -> float:
    """Epsilon at `delta` of the best of a random number of runs, each drawn at random from `trials`.

    Raises:
        ValueError: there are no trials.
    """
    if not trials:
        raise ValueError("expected at least one trial")
    distinct = {tuple(sorted(spent.items())): spent for spent in trials}
    curve = worst([Curve.of(spent) for spent in distinct.values()])
    return best_of(curve, repetitions).epsilon(delta)


def epsilon_of_all(trials: Sequence[Composition], delta: float) -> float:
    """Epsilon at `delta` of all the trials together, after which any of them may be chosen in any way."""
    return epsilon(compose(*trials), delta)
