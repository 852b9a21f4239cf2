"""Writing forecasts: a CSV table of the quantiles, and a plot of history and forecast."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from io import BytesIO, StringIO
from typing import Any

HISTORY_SHOWN = 4
"""A plot shows at most this many times the horizon's steps of history."""
TICKS = 6


def forecast_csv(answer: Mapping[str, Any]) -> bytes:
    """A CSV with one row per step: its number from 1, its date if known, and every quantile."""
    quantiles: Mapping[str, list[float]] = answer["quantiles"]
    out = StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["step", "date", *(f"q{level}" for level in quantiles)])
    for place, values in enumerate(zip(*quantiles.values(), strict=True)):
        date = answer["dates"][place] if answer["dates"] else ""
        table.writerow([place + 1, date, *(repr(value) for value in values)])
    return out.getvalue().encode()


def forecast_plot(answer: Mapping[str, Any], window: Mapping[str, Any]) -> bytes:
    """A PNG with the end of the history, the middle quantile, and the band between the outer quantiles."""
    from matplotlib.figure import Figure  # which takes longer to import than a table needs

    quantiles = answer["quantiles"]
    levels = list(quantiles)
    horizon = len(quantiles[levels[0]])
    seen = window["history"][-HISTORY_SHOWN * horizon :]
    middle = levels[len(levels) // 2]
    before, ahead = range(1 - len(seen), 1), range(0, horizon + 1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(before, seen, color="0.3", label="history")
    if len(levels) > 1:
        low, high = ([seen[-1], *quantiles[level]] for level in (levels[0], levels[-1]))
        axes.fill_between(ahead, low, high, alpha=0.25, linewidth=0, label=f"{levels[0]} to {levels[-1]}")
    axes.plot(ahead, [seen[-1], *quantiles[middle]], color="C0", marker=".", label=f"forecast ({middle})")
    dates = [*window["dates"][-len(seen) :], *answer["dates"]]
    if len(dates) == len(seen) + horizon:
        shown = range(0, len(dates), -(-len(dates) // TICKS))
        axes.set_xticks([before[0] + place for place in shown], [dates[place] for place in shown])
    else:
        axes.set_xlabel("steps after the last value")
    axes.legend(frameon=False)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
