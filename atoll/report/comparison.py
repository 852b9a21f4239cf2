"""The federated model beside its baselines: who is compared, on which examples, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor, isfinite

from atoll.report.run_result import RunResult
from atoll.tasks import headline_of
from atoll.tasks.metric_values import MeanOverClients, lower_is_better, mean_over

NAMES = {
    "zero_shot": "untrained head",
    "local_only": "every client alone (mean)",
    "federated": "federated",
    "pooled": "pooled (all data in one place)",
}


def row_name(row: str) -> str:
    """What a row is called; one that isn't in `NAMES` is a task's own reference.

    >>> row_name("pooled"), row_name("seasonal_naive")
    ('pooled (all data in one place)', 'seasonal naive (nothing learnt)')
    """
    return NAMES.get(row, f"{row.replace('_', ' ')} (nothing learnt)")


NO_GAP = 0.005
"""Differences between clients alone and pooled data up to here are too small to be a gap."""

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Metrics of each model that was measured, and where the federated ones come from."""

    rows: dict[str, Metrics]
    on_test_set: bool
    judged_by: str = "accuracy"
    coverage: Mapping[str, str] = field(default_factory=dict)
    """Over how many clients a metric of the federated model is a mean, where not over all."""

    @property
    def metrics(self) -> list[str]:
        """The federated model's metrics, or, without it, those of whoever has some."""
        first = self.rows.get("federated") or next(iter(self.rows.values()), {})
        return [name for name in first if name != "examples"]

    @property
    def headline(self) -> str | None:
        """The metric the run is judged by: its task's, or else the first that is not a loss."""
        if self.judged_by in self.metrics:
            return self.judged_by
        return next((m for m in self.metrics if not lower_is_better(m)), next(iter(self.metrics), None))

    @property
    def remarks(self) -> list[str]:
        """A line on the federated metrics that are undefined at some clients, by how many have them."""
        metrics: dict[str, list[str]] = {}
        for metric, part in self.coverage.items():
            metrics.setdefault(part, []).append(metric.replace("_", " "))
        return [f"federated {', '.join(names)}: mean {part}" for part, names in metrics.items()]

    def value(self, row: str, metric: str) -> float | None:
        """A finite number, or None where there is none."""
        return finite(self.rows.get(row, {}).get(metric))

    @property
    def gap_closed(self) -> float | None:
        """Of the way from clients alone to pooled data, the share that federation went.

        None where the two ends are as good as equal or the wrong way round, or where
        federation was not measured on the examples that they were.
        """
        metric = self.headline
        if metric is None or not self.on_test_set:
            return None
        alone, pooled = self.value("local_only", metric), self.value("pooled", metric)
        federated = self.value("federated", metric)
        if alone is None or pooled is None or federated is None:
            return None
        gap = alone - pooled if lower_is_better(metric) else pooled - alone
        way = alone - federated if lower_is_better(metric) else federated - alone
        return way / gap if gap > NO_GAP else None


def comparison_of(result: RunResult, *, by_folds: bool = False) -> Comparison:
    """The task's references, then the rows in the order of `NAMES`.

    The federated one is from the server's test set, else its clients; `by_folds` from its clients only.
    """
    server = {} if by_folds else result.final["server"]
    means = {} if server else mean_over_clients(result)
    federated = server or {name: mean.value for name, mean in means.items()}
    rows = dict(result.baselines) | {"federated": federated}
    order = [name for name in rows if name not in NAMES] + list(NAMES)
    return Comparison(
        {name: rows[name] for name in order if rows.get(name)},
        on_test_set=bool(server),
        judged_by=headline_of(result.task),
        coverage={name: mean.coverage for name, mean in means.items() if mean.coverage},
    )


def mean_over_clients(result: RunResult) -> dict[str, MeanOverClients]:
    """Metrics averaged over the clients at which they are defined, weighted by their validation examples."""
    clients = [c for c in result.final["clients"].values() if c["examples"]]
    names = dict.fromkeys(name for client in clients for name in client if name != "examples")
    return {n: mean_over([(finite(c.get(n)), c["examples"] or 0) for c in clients]) for n in names}


def finite(value: object) -> float | None:
    """The value if it is a number one can plot."""
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def whole_percent(share: float) -> str:
    """Rounded down, so that only all is 100 %.

    >>> whole_percent(0.9979)
    '99 %'
    """
    return f"{floor(share * 100 + 1e-9)} %"
