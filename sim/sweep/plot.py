"""The picture of a sweep: what varies along the axis, the metric above it, a band for what seeds change."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from atoll.report.text import metric_label
from atoll.sim.sweep.grid import EPSILON, format_value
from atoll.sim.sweep.results import (
    REFERENCES,
    Estimate,
    Row,
    grouped,
    headline_of,
    reference,
    scores,
    values_of,
)
from atoll.tasks.metric_values import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE = "#17211f", "#5a6664", "#e2e0d8"
COLOURS = ("#0a6c6c", "#b4502b", "#7a58a8", "#3a6ea5", "#9a7b16", "#a03060")
MARKERS = ("o", "s", "^", "D", "v", "P")
LEVELS = {"pooled": ("#3a4658", (0, (8, 2, 1.5, 2))), "local_only": ("#8a6d3b", (0, (5, 2.5))),
          "zero_shot": ("#77716a", (0, (1, 2)))}  # fmt: skip
SETTINGS: dict[Any, Any] = {
    "font.size": 11, "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "axes.titlesize": 13,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.8,
    "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "text.color": INK, "text.parse_math": False, "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip


def axis_of(rows: Sequence[Row]) -> str:
    """The varied key along the axis: epsilon, or the first whose values are numbers, or the first."""
    keys = list(rows[0].values)
    if EPSILON in keys and any(row.is_private for row in rows):
        return EPSILON
    return next((key for key in keys if all(_is_number(row.values[key]) for row in rows)), keys[0])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def frontier_png(rows: Sequence[Row], title: str) -> bytes:
    """The picture as PNG; there must be a run that was measured."""
    return picture(title, lambda axes: draw(axes, rows))


def picture(title: str, drawn: Callable[[Axes], None]) -> bytes:
    """One plot as PNG: what is drawn on its axes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(title=title)
        drawn(axes)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def draw(axes: Axes, rows: Sequence[Row]) -> None:
    """Lines, bands, levels, names."""
    key = axis_of(rows)
    along = [row for row in rows if row.is_private] if key == EPSILON else list(rows)
    places = _places(axes, key, along)
    others = [other for other in rows[0].values if other != key]
    for number, group in enumerate(grouped(along, lambda row: values_of(row, others)).values()):
        name = ", ".join(f"{o} {format_value(group[0].values[o])}" for o in others) or "federated"
        _line(axes, group, key, places, number, name)
    if key == EPSILON:
        _without_privacy(axes, [row for row in rows if not row.is_private], others)
    for name, label in REFERENCES.items():
        scores_found = reference(rows, name)
        if scores_found is not None:
            colour, dashes = LEVELS[name]
            axes.axhline(scores_found.mean, color=colour, linestyle=dashes, linewidth=1.3, label=label)
    metric = headline_of(rows) or ""
    axes.set_ylabel(metric_label(metric) + (" (lower is better)" if lower_is_better(metric) else ""))
    axes.set_xlabel("epsilon (more privacy to the left)" if key == EPSILON else key)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=10)


def _places(axes: Axes, key: str, rows: Sequence[Row]) -> dict[str, float]:
    """Where each value of the key stands, by its words."""
    values = {format_value(row.values[key]): row.values[key] for row in rows}
    numbers = [float(v) for v in values.values() if _is_number(v)]
    if len(numbers) < len(values):
        places = {value_text: float(place) for place, value_text in enumerate(values)}
    else:
        places = {value_text: float(value) for value_text, value in values.items()}
        if min(numbers) > 0 and (key == EPSILON or max(numbers) >= 10 * min(numbers)):
            axes.set_xscale("log")
    shown = places if len(places) <= 12 else {}
    if shown:
        axes.set_xticks(list(shown.values()), list(shown))
        axes.minorticks_off()
    return places


def _line(
    axes: Axes, rows: Sequence[Row], key: str, places: dict[str, float], number: int, name: str
) -> None:
    """The means of one combination of the other keys, and the band of their 95 % intervals."""
    by_value = grouped(rows, lambda row: (format_value(row.values[key]),))
    by_place = {places[str(value)]: Estimate.of(scores(g)) for (value,), g in by_value.items() if scores(g)}
    xs = sorted(by_place)
    colour = COLOURS[number % len(COLOURS)]
    axes.plot(
        xs, [by_place[x].mean for x in xs], color=colour, marker=MARKERS[number % len(MARKERS)],
        linewidth=2.2, markersize=6, label=name,
    )  # fmt: skip
    low = [by_place[x].mean - (by_place[x].half or 0.0) for x in xs]
    high = [by_place[x].mean + (by_place[x].half or 0.0) for x in xs]
    axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)


def _without_privacy(axes: Axes, rows: Sequence[Row], others: Sequence[str]) -> None:
    """A level, with its band, for each combination of what has a meaning without privacy."""
    for group in grouped(rows, lambda row: values_of(row, others)).values():
        if not scores(group):
            continue
        estimate = Estimate.of(scores(group))
        texts = [f"{o} {format_value(v)}" for o in others if (v := group[0].values[o]) is not None]
        axes.axhline(estimate.mean, color=INK, linewidth=1.5, label=", ".join(["no privacy", *texts]))
        if estimate.half is not None:
            axes.axhspan(
                estimate.mean - estimate.half,
                estimate.mean + estimate.half,
                color=INK,
                alpha=0.08,
                linewidth=0,
            )
