"""Metrics as numbers, of which one may be undefined, and their means over clients.

A metric is undefined where nothing was there that it could measure: AUROC without a positive example, an
error per word without words. It is None then, `null` in a file and a dash in a table, and never 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torchmetrics import MetricCollection

MetricValues = dict[str, float | None]
"""Metrics by name; None is undefined."""

UNDEFINED = "\N{EN DASH}"
"""What a table shows for a metric that is undefined."""


def defined(value: float | torch.Tensor) -> float | None:
    """A finite number, or None where there is none.

    >>> defined(0.5), defined(float("nan"))
    (0.5, None)
    """
    number = float(value)
    return number if isfinite(number) else None


def computed(metrics: MetricCollection) -> MetricValues:
    """Each metric of what was added to it; those that divide by nothing are undefined."""
    return {name: defined(value) for name, value in metrics.compute().items()}


@dataclass(frozen=True)
class MeanOverClients:
    """A mean over those clients at which a metric is defined, and how many these are."""

    value: float | None
    defined: int
    clients: int

    @property
    def coverage(self) -> str:
        """Which clients are in the mean, where not all are.

        >>> mean_over([(1.0, 1), (None, 1), (0.5, 1)]).coverage
        'over 2 of 3 clients'
        """
        return f"over {self.defined} of {self.clients} clients" if self.defined < self.clients else ""


def mean_over(measured: Sequence[tuple[float | None, float]]) -> MeanOverClients:
    """The mean of (value, weight) pairs, without those whose value is undefined.

    >>> mean_over([(1.0, 1), (None, 1), (0.5, 3)]).value
    0.625
    """
    pairs = [(value, weight) for value, weight in measured if value is not None]
    total = sum(weight for _, weight in pairs)
    value = sum(value * weight for value, weight in pairs) / total if total else None
    return MeanOverClients(value, len(pairs), len(measured))


def means(measured: Iterable[MetricValues]) -> dict[str, MeanOverClients]:
    """Of each metric its mean, in which all count the same.

    >>> {name: mean.value for name, mean in means([{"auroc": 1.0}, {"auroc": None}]).items()}
    {'auroc': 1.0}
    """
    rows = list(measured)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean_over([(row.get(name), 1) for row in rows]) for name in names}


def values_in_words(values: MetricValues) -> list[str]:
    """Each metric with three decimals, for a line about a round.

    >>> values_in_words({"accuracy": 0.5})
    ['accuracy 0.500']
    """
    return [f"{name} {UNDEFINED if value is None else f'{value:.3f}'}" for name, value in values.items()]
