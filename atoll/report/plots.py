"""The report's figures, as inline SVG that takes its colours from the page's style sheet.

Matplotlib draws without pyplot: nothing is kept between figures. Its settings are global, so a
lock holds them for the time of one drawing. Ids depend on the figure's name alone: the same
numbers give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from threading import Lock
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.0, 3.2
"""In inches of 72 units; a figure shown 360 CSS pixels wide has its letters at their nominal size."""

MARGINS = {"left": 0.16, "right": 0.945, "bottom": 0.155, "top": 0.885}
"""Parts of the width and the height. Matplotlib's own layouts measure every letter: half of the time."""

COLOURS = {
    "--ink": "#010100",
    "--muted": "#020200",
    "--rule": "#030300",
    "--federated": "#040400",
    "--local_only": "#050500",
    "--zero_shot": "#060600",
    "--pooled": "#070700",
    "--training": "#080800",
}
"""Stand-ins for the style sheet's variables, which differ in light and dark; no figure shows them."""

DASHES: dict[str, str | tuple[float, tuple[float, ...]]] = {
    "zero_shot": (0, (1, 2)),
    "local_only": (0, (5, 2.5)),
    "pooled": (0, (8, 2, 1.5, 2)),
}
MARKED = 30
"""Points up to which each one of a curve has its marker."""

BINS = 24
STACKED = 14
"""Clients in one bin up to which each one is a dot."""

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": COLOURS["--rule"],
    "axes.labelcolor": COLOURS["--muted"],
    "axes.titlesize": 12.5,
    "axes.titlecolor": COLOURS["--ink"],
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["--rule"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["--rule"],
    "ytick.color": COLOURS["--rule"],
    "xtick.labelcolor": COLOURS["--muted"],
    "ytick.labelcolor": COLOURS["--muted"],
    "ytick.major.size": 0,
    "text.color": COLOURS["--ink"],
}
_lock = Lock()

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `kind` is the style sheet's name of its colour."""

    kind: str
    points: Points


def curves_plot(
    name: str, title: str, curves: Sequence[Curve], levels: dict[str, float], *, percent: bool
) -> Markup:
    """Curves over rounds, with baselines as horizontal lines."""
    with Drawing(name, title) as drawing:
        axes = drawing.axes
        for kind, level in levels.items():
            axes.axhline(level, color=COLOURS[f"--{kind}"], linestyle=DASHES[kind], linewidth=1.4)
        for curve in curves:
            _curve(axes, curve)
        axes.set_xlabel("round")
        _whole_rounds(axes, [x for curve in curves for x, _ in curve.points])
        _ticks(axes, percent)
    return drawing.svg


def _curve(axes: Axes, curve: Curve) -> None:
    marker = "o" if len(curve.points) <= MARKED else ""
    xs, ys = zip(*curve.points, strict=True)
    width = 2.2 if curve.kind == "federated" else 1.4
    axes.plot(
        xs, ys, color=COLOURS[f"--{curve.kind}"], linewidth=width, marker=marker, markersize=1.7 * width
    )


def _whole_rounds(axes: Axes, rounds: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    room = max(0.5, (max(rounds) - min(rounds)) * 0.03)
    axes.set_xlim(min(rounds) - room, max(rounds) + room)


def _ticks(axes: Axes, percent: bool, *, along: str = "y") -> None:
    from matplotlib.ticker import MaxNLocator

    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if percent:
        axis.set_major_formatter(lambda value, _: f"{value * 100:.4g} %")


def spread_plot(name: str, title: str, values: Sequence[float], *, percent: bool, median: float) -> Markup:
    """How a metric is spread over clients: a dot a client, or bars where they are many."""
    with Drawing(name, title) as drawing:
        axes = drawing.axes
        axes.axvline(median, color=COLOURS["--ink"], linewidth=1, linestyle=(0, (3, 2)), zorder=0)
        width, bins = _binned(values)
        if max(len(members) for members in bins.values()) <= STACKED:
            _dots(axes, bins)
        else:
            centres = [min(values) + (i + 0.5) * width for i in bins]
            axes.bar(centres, [len(m) for m in bins.values()], width * 0.86, color=COLOURS["--federated"])
            axes.set_ylabel("clients")
        axes.margins(x=0.06)
        _ticks(axes, percent, along="x")
    return drawing.svg


def _binned(values: Sequence[float]) -> tuple[float, dict[int, list[float]]]:
    """The width of a bin, and the values in each bin that has some."""
    low = min(values)
    width = (max(values) - low) / BINS or 1 / BINS
    bins: dict[int, list[float]] = {}
    for value in values:
        bins.setdefault(min(BINS - 1, int((value - low) / width)), []).append(value)
    return width, bins


def _dots(axes: Axes, bins: dict[int, list[float]]) -> None:
    """Each bin's clients, one above the other, at their mean: where all are equal that is exact."""
    points = [(sum(m) / len(m), i + 0.5) for m in bins.values() for i in range(len(m))]
    xs, ys = zip(*points, strict=True)
    axes.scatter(xs, ys, s=46, color=COLOURS["--federated"], linewidths=0)
    axes.set_ylim(0, max(max(len(m) for m in bins.values()) + 0.6, 8))
    axes.set_yticks([])
    axes.set_xlabel("a dot is a client; the dashed line is the median")


def scatter_plot(name: str, title: str, points: Points, *, percent: bool) -> Markup:
    """A client's metric against its number of examples."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    with Drawing(name, title) as drawing:
        axes = drawing.axes
        xs, ys = zip(*points, strict=True)
        if max(xs) > 50 * min(xs):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.scatter(xs, ys, s=34, color=COLOURS["--federated"], alpha=0.55, linewidths=0)
        axes.set_xlabel("validation examples")
        _ticks(axes, percent)
    return drawing.svg


def seconds_plot(name: str, title: str, rounds: Points) -> Markup:
    """Seconds of each round."""
    with Drawing(name, title) as drawing:
        axes = drawing.axes
        xs, ys = zip(*rounds, strict=True)
        edges = [x - 0.5 for x in (*xs, xs[-1] + 1)]
        axes.fill_between(edges, [*ys, ys[-1]], step="post", color=COLOURS["--federated"], linewidth=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("round")
        _whole_rounds(axes, xs)
        _ticks(axes, percent=False)
    return drawing.svg


class Drawing:
    """One figure with one pair of axes; `svg` is there once the block is left."""

    svg = Markup("")

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title

    def __enter__(self) -> Drawing:
        import matplotlib
        from matplotlib.figure import Figure

        _lock.acquire()
        self._settings = matplotlib.rc_context()
        self._settings.__enter__()
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS | {"svg.hashsalt": self.name})
        self.figure: Figure = Figure(figsize=(WIDTH, HEIGHT))
        self.axes: Axes = self.figure.add_subplot(title=self.title)
        self.figure.subplots_adjust(**MARGINS)
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            if failure[0] is None:
                self.svg = _inlined(self.figure, self.name, self.title)
        finally:
            self._settings.__exit__(None, None, None)
            _lock.release()


def _inlined(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an `<svg>` element: no namespace, no metadata, no font, ids of its own.

    Ids begin with the name, where anything but a letter, a digit, _ or - is written as its code.
    """
    text = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"<svg [^>]*>", "", text.getvalue()[text.getvalue().index("<svg ") :], count=1)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="(?!m[0-9a-f]{10})[^"]*">', "<g>", svg)
    prefix = re.sub(r"[^\w-]", lambda other: f"{ord(other[0]):x}-", name)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for variable, stand_in in COLOURS.items():
        svg = svg.replace(stand_in, f"var({variable})")
    box = f"0 0 {WIDTH * 72:g} {HEIGHT * 72:g}"
    head = f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escape(title)}">'
    return Markup(head + svg)
