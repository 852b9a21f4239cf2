"""The report's section on clients: how the final model does at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from markupsafe import Markup

from atoll.report.comparison import finite
from atoll.report.plots import scatter_plot, spread_plot
from atoll.report.run_result import RunResult
from atoll.report.text import join_words, metric_label, metric_value, pluralize, quantile
from atoll.tasks.metric_values import lower_is_better

ALL_UP_TO = 200
"""Clients above which the table shows the ends only."""
WORST, BEST = 100, 20
SHORT = 12
"""Clients above which the table scrolls by itself."""

Client = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class ClientRow:
    """A client's line in the table: its metrics written out, none where it had no validation examples."""

    name: str
    examples: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class ClientsSection:
    """How a metric is spread over clients, and a table with the worst first.

    Of very many clients only the first of `shown` and the last, `best`, are there; `left_out` says so.
    """

    reading: str
    plots: tuple[Markup, ...]
    quantiles: tuple[tuple[str, str], ...]
    judged_by: str
    metrics: tuple[str, ...]
    shown: tuple[ClientRow, ...]
    left_out: str
    best: tuple[ClientRow, ...]

    @property
    def is_long(self) -> bool:
        """Whether the table needs a box that scrolls."""
        return len(self.shown) + len(self.best) > SHORT


def clients_section(result: RunResult, metric: str | None) -> ClientsSection | None:
    """The clients ranked by a metric, or None where no client measured it."""
    clients = result.final["clients"]
    measured = [(n, c) for n, c in clients.items() if metric and finite(c.get(metric)) is not None]
    others = [(n, clients[n]) for n in sorted(clients.keys() - dict(measured).keys())]
    undefined = [client for client in others if client[1]["examples"]]
    without = [client for client in others if not client[1]["examples"]]
    if not metric or not measured:
        return None
    ranked = sorted(measured, key=lambda item: (_badness(item[1], metric), item[0]))
    metrics = [name for name in ranked[0][1] if name != "examples"]
    many = len(clients) > ALL_UP_TO
    best = ranked[WORST:][-BEST:] if many else []
    return ClientsSection(
        reading=_sampled(result) + _summary(ranked, len(undefined), len(without), metric),
        plots=_plots(ranked, metric),
        quantiles=_quantiles(ranked, metric),
        judged_by=metric_label(metric),
        metrics=tuple(metric_label(name) for name in metrics),
        shown=tuple(_row(c, metrics) for c in (ranked[:WORST] if many else [*ranked, *undefined, *without])),
        left_out=_left_out(len(ranked) - WORST - len(best), len(undefined), len(without)) if many else "",
        best=tuple(_row(client, metrics) for client in best),
    )


def _badness(client: dict[str, Any], metric: str) -> float:
    """Sorts the worst to the front."""
    value = float(client[metric])
    return -value if lower_is_better(metric) else value


def _sampled(result: RunResult) -> str:
    """Which part of the clients measured, if not all did."""
    measured, everybody = len(result.final["clients"]), result.population
    return f"{measured:,} of {everybody:,} clients measured. " if measured < everybody else ""


def _summary(ranked: list[Client], undefined: int, without: int, metric: str) -> str:
    """A sentence on the median and the worst client, and one on those that measured nothing."""
    values = sorted(c[metric] for _, c in ranked)
    word = metric_label(metric)
    sentence = (
        f"On their own validation examples, at least half of the clients see a final {word} of"
        f" {metric_value(metric, quantile(values, 0.5))} or better;"
        f" the worst, {ranked[0][0]}, sees {metric_value(metric, ranked[0][1][metric])}."
    )
    if undefined:
        sentence += f" At {pluralize(undefined, 'client')} it is undefined."
    return sentence + (f" {pluralize(without, 'client')} had no validation examples." if without else "")


def _plots(ranked: list[Client], metric: str) -> tuple[Markup, ...]:
    """The metric's spread, and the metric against a client's number of examples."""
    values = sorted(float(c[metric]) for _, c in ranked)
    percent, word = "accuracy" in metric, metric_label(metric)
    points = [(float(c["examples"]), float(c[metric])) for _, c in ranked]
    title = f"{word[0].upper()}{word[1:]} at each client"
    return (
        spread_plot("spread", title, values, percent=percent, median=quantile(values, 0.5)),
        scatter_plot("scatter", f"{title}, by its examples", points, percent=percent),
    )


def _quantiles(ranked: list[Client], metric: str) -> tuple[tuple[str, str], ...]:
    """(name, value) of the metric's quantiles over clients."""
    values = sorted(float(c[metric]) for _, c in ranked)
    shares = {"lowest": 0.0, "10 % quantile": 0.1, "median": 0.5, "90 % quantile": 0.9, "highest": 1.0}
    by_name = {name: quantile(values, share) for name, share in shares.items()}
    by_name["mean of the worst tenth"] = worst_tenth(values, metric)
    by_name["standard deviation"] = pstdev(values)
    return tuple((name, metric_value(metric, value)) for name, value in by_name.items())


def worst_tenth(values: Sequence[float], metric: str) -> float:
    """The mean over the tenth of the clients, rounded up, for whom the metric is worst.

    >>> worst_tenth([0.9, 0.5, 0.7], "accuracy"), worst_tenth([float(n) for n in range(20)], "loss")
    (0.5, 18.5)
    """
    ranked = sorted(values, reverse=lower_is_better(metric))
    return fmean(ranked[: -(-len(ranked) // 10)])


def _row(client: Client, metrics: list[str]) -> ClientRow:
    """The client's line, with the metrics in this order."""
    name, measured = client
    if not measured["examples"]:
        return ClientRow(name, "0", ())
    return ClientRow(
        name, f"{measured['examples']:,}", tuple(metric_value(m, measured.get(m)) for m in metrics)
    )


def _left_out(between: int, undefined: int, without: int) -> str:
    """The sentence on the clients that the table doesn't show, empty where it shows all.

    >>> _left_out(378, 0, 2)
    '378 clients in between and 2 clients without validation examples left out; all are in result.json.'
    """
    counts = {
        "in between": between,
        "at which it is undefined": undefined,
        "without validation examples": without,
    }
    groups = [f"{pluralize(count, 'client')} {which}" for which, count in counts.items() if count > 0]
    return f"{join_words(groups)} left out; all are in result.json." if groups else ""
