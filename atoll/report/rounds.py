"""The report's section on rounds: a curve of each metric, beside the baselines as level lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from atoll.report.comparison import NAMES, Comparison, finite
from atoll.report.plots import Curve, Points, curves_plot
from atoll.report.run_result import RoundLine
from atoll.report.text import metric_label

PLOTTED = 1000
"""Rounds above which a curve is thinned."""


@dataclass(frozen=True)
class RoundsSection:
    """The plots over rounds and their key: (kind, name) of each line."""

    plots: tuple[Markup, ...]
    key: tuple[tuple[str, str], ...]
    has_training_loss: bool


def rounds_section(rounds: Sequence[RoundLine], compared: Comparison) -> RoundsSection:
    """A plot of every metric that any round has, and of the training loss."""
    training = series(rounds, "loss", of_round=True)
    metrics = list(dict.fromkeys(metric for line in rounds for metric in line["metrics"]))
    if training and "loss" not in metrics:
        metrics.append("loss")
    plots = (_plot(rounds, compared, m, training if m == "loss" else []) for m in metrics)
    return RoundsSection(
        plots=tuple(plot for plot in plots if plot is not None),
        key=tuple(_key(compared, has_training_loss=bool(training))),
        has_training_loss=bool(training),
    )


def series(rounds: Sequence[RoundLine], name: str, *, of_round: bool = False) -> list[tuple[float, float]]:
    """(round, value) where a metric, or the round itself, has a value; thinned where there are very many."""
    lines = ((line["round"], (line if of_round else line["metrics"]).get(name)) for line in rounds)
    points = [(float(round), v) for round, value in lines if (v := finite(value)) is not None]
    step = -(-len(points) // PLOTTED) or 1
    return points[: len(points) - 1 : step] + points[-1:]


def _plot(rounds: Sequence[RoundLine], compared: Comparison, metric: str, training: Points) -> Markup | None:
    """One metric over rounds, or None where no round has a value."""
    measured = series(rounds, metric)
    curves = [
        Curve(kind, points) for kind, points in (("training", training), ("federated", measured)) if points
    ]
    if not curves:
        return None
    baselines = (row for row in _lines(compared) if row != "federated")
    levels = {row: level for row in baselines if (level := compared.value(row, metric)) is not None}
    word = metric_label(metric)
    title = f"{word[0].upper()}{word[1:]} over rounds"
    return curves_plot(f"curve-{metric}", title, curves, levels, percent="accuracy" in metric)


def _lines(compared: Comparison) -> list[str]:
    """The rows that plots show: without a test set of the server's, baselines saw other examples."""
    return [row for row in compared.rows if row in NAMES and (compared.on_test_set or row == "federated")]


def _key(compared: Comparison, *, has_training_loss: bool) -> list[tuple[str, str]]:
    """The kind and the name of each line."""
    lines = [(row, NAMES[row]) for row in _lines(compared)]
    return [*lines, ("training", "training loss at the clients")] if has_training_loss else lines
