"""Metrics as figures."""

from __future__ import annotations


def defined(value: float | None) -> float:
    """The value of a metric that a figure is made of.

    Raises:
        ValueError: the metric is undefined.
    """
    if value is None:
        raise ValueError("the metric is undefined, expected a number")
    return value
