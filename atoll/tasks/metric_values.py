"""Values of metrics, which may be undefined, and their means over clients.

A metric is undefined if there is nothing to measure, such as AUROC without a positive example or an error per
word without words. Its value is then None, `null` in a file and a dash in a table, and never 0.
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
"""Values by the metric's name; None is undefined."""

UNDEFINED = "\N{EN DASH}"
"""What a table shows for an undefined metric."""


ERRORS = ("mae", "rmse", "mase", "pinball", "wer", "cer", "bits_per_byte", "unparsable_rate")
"""Metrics whose names don't say that they are errors."""

ERROR_WORDS = ("loss", "error", "perplexity")
"""Words in the names of other metrics that are."""


def lower_is_better(metric: str) -> bool:
    """Whether a metric falls as the model improves, by its name alone: reports have nothing else.

    >>> lower_is_better("loss"), lower_is_better("macro_f1"), lower_is_better("mae")
    (True, False, True)
    """
    return metric in ERRORS or any(word in metric for word in ERROR_WORDS)


def direction_fault(metric: str, higher_is_better: bool | None) -> str | None:
    """What is wrong if a metric's name says that it rises as the model improves where it falls, or reversed.

    >>> direction_fault("mae", False), direction_fault("top", None)
    (None, None)
    """
    if higher_is_better is None or higher_is_better != lower_is_better(metric):
        return None
    names = f"one that has {', '.join(ERROR_WORDS)} in it, or is {', '.join(ERRORS)}"
    if higher_is_better:
        return (
            f"it has higher_is_better = True, and its name is an error's; expected another name than {names}"
        )
    return f"it has higher_is_better = False, which its name must say; expected {names}"


def defined(value: float | torch.Tensor) -> float | None:
    """The value as a float; None if it isn't finite.

    >>> defined(0.5), defined(float("nan"))
    (0.5, None)
    """
    number = float(value)
    return number if isfinite(number) else None


def computed(metrics: MetricCollection) -> MetricValues:
    """The value of each metric in the collection; None where it isn't a finite number."""
    return {name: defined(value) for name, value in metrics.compute().items()}


@dataclass(frozen=True)
class MeanOverClients:
    """The mean of a metric over the clients where it is defined, and the numbers of clients.

    `defined` of `clients` have a value; `value` is None if none has.
    """

    value: float | None
    defined: int
    clients: int

    @property
    def coverage(self) -> str:
        """How many clients the mean is over; empty if it is over all of them.

        >>> mean_over([(1.0, 1), (None, 1), (0.5, 1)]).coverage
        'over 2 of 3 clients'
        """
        return f"over {self.defined} of {self.clients} clients" if self.defined < self.clients else ""


def mean_over(measured: Sequence[tuple[float | None, float]]) -> MeanOverClients:
    """The weighted mean of (value, weight) pairs, without the pairs whose value is None.

    >>> mean_over([(1.0, 1), (None, 1), (0.5, 3)]).value
    0.625
    """
    pairs = [(value, weight) for value, weight in measured if value is not None]
    total = sum(weight for _, weight in pairs)
    value = sum(value * weight for value, weight in pairs) / total if total else None
    return MeanOverClients(value, len(pairs), len(measured))


def means(measured: Iterable[MetricValues]) -> dict[str, MeanOverClients]:
    """Each metric's unweighted mean over the given tables of values.

    >>> {name: mean.value for name, mean in means([{"auroc": 1.0}, {"auroc": None}]).items()}
    {'auroc': 1.0}
    """
    rows = list(measured)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean_over([(row.get(name), 1) for row in rows]) for name in names}


def format_values(values: MetricValues) -> list[str]:
    """Each metric's name and value with three decimals, as text.

    >>> format_values({"accuracy": 0.5})
    ['accuracy 0.500']
    """
    return [f"{name} {UNDEFINED if value is None else f'{value:.3f}'}" for name, value in values.items()]
