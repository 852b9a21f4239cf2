"""Metrics as figures."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.sim.sweep.results import Estimate


def defined(value: float | None) -> float:
    """The value of a metric that a figure is made of.

    Raises:
        ValueError: the metric is undefined.
    """
    if value is None:
        raise ValueError("the metric is undefined, expected a number")
    return value


def mean_and_half(estimate: Estimate, sign: str = "", digits: int = 3) -> str:
    """A mean with half of its 95 % interval, where there are several seeds."""
    half = "" if estimate.half is None else f" ± {estimate.half:.{digits}f}"
    return f"{estimate.mean:{sign}.{digits}f}{half}"


def in_percent(shares: Sequence[float], digits: int = 1) -> str:
    """The mean of shares over seeds with half of its 95 % interval, in percent."""
    return mean_and_half(Estimate.of([100 * share for share in shares]), digits=digits)
