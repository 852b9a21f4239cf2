"""The report's section on clients: how the final model does at each of them."""

from __future__ import annotations

from typing import Any

from atoll.report.comparison import finite, lower_is_better
from atoll.report.html import Markup, Table, facts, figure, paragraph, section
from atoll.report.plots import scatter_plot, spread_plot
from atoll.report.text import metric_value, metric_words, pluralize, population, quantile

ALL_UP_TO = 200
"""Clients above which the table shows the ends only."""
WORST, BEST = 100, 20

Client = tuple[str, dict[str, Any]]


def clients_section(result: dict[str, Any], metric: str | None) -> Markup:
    """Spread over clients, and a table with the worst first."""
    clients = result["final"]["clients"]
    measured = [(n, c) for n, c in clients.items() if metric and finite(c.get(metric)) is not None]
    without = [(n, clients[n]) for n in sorted(clients.keys() - dict(measured).keys())]
    if not metric or not measured:
        return section(
            "Clients", paragraph("No client measured the final model on validation examples of its own.")
        )
    ranked = sorted(measured, key=lambda item: (_badness(item[1], metric), item[0]))
    return section(
        "Clients",
        paragraph(_sampled(result) + _summary(ranked, len(without), metric), "reading"),
        _spread(ranked, metric),
        _table(ranked, without, metric),
    )


def _sampled(result: dict[str, Any]) -> str:
    """Which part of the clients measured, if not all did."""
    measured, everybody = len(result["final"]["clients"]), population(result)
    return f"{measured:,} of {everybody:,} clients measured. " if measured < everybody else ""


def _badness(client: dict[str, Any], metric: str) -> float:
    """Sorts the worst to the front."""
    value = float(client[metric])
    return -value if lower_is_better(metric) else value


def _summary(ranked: list[Client], without: int, metric: str) -> str:
    values = sorted(c[metric] for _, c in ranked)
    word = metric_words(metric)
    said = (
        f"On their own validation examples, at least half of the clients see a final {word} of"
        f" {metric_value(metric, quantile(values, 0.5))} or better;"
        f" the worst, {ranked[0][0]}, sees {metric_value(metric, ranked[0][1][metric])}."
    )
    return said + (f" {pluralize(without, 'client')} had no validation examples." if without else "")


def _spread(ranked: list[Client], metric: str) -> Markup:
    values = sorted(float(c[metric]) for _, c in ranked)
    percent, word = "accuracy" in metric, metric_words(metric)
    points = [(float(c["examples"]), float(c[metric])) for _, c in ranked]
    title = f"{word[0].upper()}{word[1:]} at each client"
    spread = spread_plot("spread", title, values, percent=percent, median=quantile(values, 0.5))
    scatter = scatter_plot("scatter", f"{title}, by its examples", points, percent=percent)
    shares = (
        ("lowest", 0.0),
        ("10 % quantile", 0.1),
        ("median", 0.5),
        ("90 % quantile", 0.9),
        ("highest", 1.0),
    )
    numbers = facts(((n, metric_value(metric, quantile(values, s))) for n, s in shares), "tiles quantiles")
    return Markup(f'<div class="plots">{figure(spread)}{figure(scatter)}</div>{numbers}')


def _table(ranked: list[Client], without: list[Client], metric: str) -> Markup:
    metrics = [name for name in ranked[0][1] if name != "examples"]
    head = ["client", "examples", *(metric_words(m) for m in metrics)]
    caption = f"The final model on each client's own validation examples, worst {metric_words(metric)} first"
    table = Table(caption, head, style="long" if len(ranked) + len(without) > 12 else "")
    many = len(ranked) + len(without) > ALL_UP_TO
    for name, client in ranked[:WORST] if many else [*ranked, *without]:
        _row(table, name, client, metrics)
    if many:
        _best(table, ranked[WORST:], len(without), metrics)
    return Markup(f"<h3>Client by client</h3>{table.html()}")


def _row(table: Table, name: str, client: dict[str, Any], metrics: list[str]) -> None:
    if client["examples"]:
        table.row(name, f"{client['examples']:,}", *(metric_value(m, client.get(m)) for m in metrics))
    else:
        none = Markup('<span class="none">no validation examples</span>')
        table.row(name, "0", none, *[""] * (len(metrics) - 1))


def _best(table: Table, rest: list[Client], without: int, metrics: list[str]) -> None:
    best = rest[-BEST:]
    left_out = len(rest) - len(best)
    unmeasured = f" and {pluralize(without, 'client')} without validation examples" if without else ""
    if left_out or without:
        table.remark(
            f"{pluralize(left_out, 'client')} in between{unmeasured} left out; all are in result.json."
        )
    for name, client in best:
        _row(table, name, client, metrics)
