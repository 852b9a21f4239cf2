"""What a search leaves behind: a line a trial for machines, a picture, and the best job as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.report.text import metric_label
from atoll.server.run.directory import job_toml
from atoll.sim.search.study import Search, TrialResult
from atoll.sim.sweep.grid import format_value
from atoll.sim.sweep.plot import COLOURS, INK, MUTED, SETTINGS
from atoll.system.durable_files import replace_synced
from atoll.tasks.metric_values import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 10
"""Trials in the table of the best."""


def write_search(search: Search, tried: Sequence[TrialResult]) -> dict[str, Path]:
    """Write trials.csv, trials.png and best.toml of the trials that have a value; the files by name."""
    ranked = search.ranked(tried)
    files = {"table": search.path / "trials.csv"}
    replace_synced(files["table"], as_csv(search, tried).encode())
    if ranked:
        files["picture"] = search.path / "trials.png"
        replace_synced(files["picture"], trials_png(search, tried))
        files["best job"] = search.path / "best.toml"
        replace_synced(files["best job"], job_toml(ranked[0].job).encode())
    return files


def as_csv(search: Search, tried: Sequence[TrialResult]) -> str:
    """A line for every trial that has ended: its settings, the clients' metrics, and how it went."""
    ended = [(one, one.outcome) for one in tried if one.outcome is not None]
    names = list(dict.fromkeys(name for _, outcome in ended for name in outcome.metrics))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    keys = [one.key for one in search.space.keys]
    lines.writerow(["trial", *keys, *names, "seconds", "note", "folder", "job_hash"])
    for one, outcome in ended:
        values = ["" if one.values[key] is None else format_value(one.values[key]) for key in keys]
        metrics = [repr(outcome.metrics[name]) if name in outcome.metrics else "" for name in names]
        lines.writerow(
            [
                one.index + 1,
                *values,
                *metrics,
                f"{outcome.seconds:.3f}",
                outcome.reason,
                one.folder,
                one.job.hash,
            ]
        )
    return text.getvalue()


def summary(search: Search, tried: Sequence[TrialResult]) -> list[str]:
    """How many there were, and what became of those without a value."""
    outcomes = [one.outcome for one in tried if one.outcome is not None]
    whole = sum(outcome.value is not None for outcome in outcomes)
    counts = {
        "stopped early": sum(outcome.stopped is not None for outcome in outcomes),
        "refused": sum(outcome.refused is not None for outcome in outcomes),
        "failed": sum(outcome.failed is not None for outcome in outcomes),
    }
    parts = [f"{whole} whole", *(f"{count} {name}" for name, count in counts.items() if count)]
    lines = [f"{len(outcomes)} trials: {', '.join(parts)}"]
    importances = search.importances(tried)
    if importances:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in importances.items())
        lines.append(f"what the {metric_label(search.metric)} hung on: {shares}")
    return lines


def trials_png(search: Search, tried: Sequence[TrialResult]) -> bytes:
    """The value of every trial over the trials, and the best so far, as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(title=f"{search.base.name}: {len(tried)} trials")
        _draw(axes, search, tried)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _draw(axes: Axes, search: Search, tried: Sequence[TrialResult]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = _values(tried)
    is_lower = lower_is_better(search.metric)
    places, best = sorted(values), []
    for place in places:
        known = [values[p] for p in places if p <= place]
        best.append(min(known) if is_lower else max(known))
    axes.step(places, best, where="post", color=INK, linewidth=1.5, label="best so far")
    axes.plot(places, [values[p] for p in places], "o", color=COLOURS[0], markersize=7, label="whole trials")
    stopped = {
        one.index + 1: one.outcome.curve[max(one.outcome.curve)]
        for one in tried
        if one.outcome and one.outcome.stopped is not None and one.outcome.curve
    }
    if stopped:
        axes.plot(list(stopped), list(stopped.values()), "x", color=MUTED, label="stopped early, last value")
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    note = " (lower is better)" if is_lower else ""
    axes.set_ylabel(f"{metric_label(search.metric)} on what clients keep back{note}")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=10)


def _values(tried: Sequence[TrialResult]) -> Mapping[int, float]:
    """The values of whole trials by their numbers, from 1 on."""
    by_number: dict[int, Any] = {one.index + 1: one.outcome.value for one in tried if one.outcome}
    return {place: value for place, value in by_number.items() if value is not None}
