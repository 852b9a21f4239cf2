"""A job with each of several strategies over the same seeds: which runs, a table, a picture over rounds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.report.clients import worst_tenth
from atoll.report.comparison import finite
from atoll.report.run_result import RunResult
from atoll.report.text import metric_label
from atoll.sim.sweep.grid import Base, Grid, Planned, planned
from atoll.sim.sweep.modes import remark_on
from atoll.sim.sweep.plot import COLOURS, picture
from atoll.sim.sweep.report import markdown_table
from atoll.sim.sweep.results import Estimate, Row, headline_of
from atoll.strategies import STRATEGIES
from atoll.system.durable_files import replace_synced
from atoll.tasks.metric_values import lower_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEY = "strategy.name"
HEAD = ("strategy", "seeds", "metric", "mean", "worst tenth of clients", "MB up", "MB down")
Results = Sequence[tuple[Planned, RunResult]]
"""What the complete runs came to, as `result.json` holds it."""


def names_of(text: str) -> list[str]:
    """The strategies of `a,b,c`, each of which there is.

    Raises:
        ConfigError: one is unknown, or there twice.
    """
    names = [name.strip() for name in text.split(",")]
    for place, name in enumerate(names):
        if not name.startswith("flwr:"):
            STRATEGIES.check(name, "--compare", " (or flwr:NAME)")
        if name in names[:place]:
            raise ConfigError(f"--compare: {name} is there twice, expected different strategies")
    return names


def grid_of(names: Sequence[str], seeds: int) -> Grid:
    """What `sweep.json` says of the comparison."""
    return Grid({KEY: tuple(names)}, seeds)


def runs_of(base: Base, names: Sequence[str], seeds: int, check: Callable[[Job], None]) -> list[Planned]:
    """Every strategy with every seed, seed by seed, so that those of one seed share what is cached.

    The job's own strategy keeps what the job says of it; any other takes its defaults.

    Raises:
        ConfigError: the job can't run with one of them; the line says which, and why.
    """
    by_name: list[list[Planned]] = []
    for name in names:
        base_strategy = base.table.get("strategy")
        options = (
            base_strategy
            if isinstance(base_strategy, dict) and base_strategy.get("name", "fedavg") == name
            else {}
        )
        varied = replace(base, table={**base.table, "strategy": {**options, "name": name}})
        try:
            runs = planned(varied, Grid({}, seeds))
            check(runs[0].job)
        except ConfigError as error:
            raise ConfigError(f"--compare: {name} can't run with this job: {error}") from None
        by_name.append([replace(run, values={KEY: name}) for run in runs])
    return [run for of_a_seed in zip(*by_name, strict=True) for run in of_a_seed]


@dataclass(frozen=True)
class Compared:
    """What one strategy reached over its seeds; bytes are those of a whole run, all clients together."""

    strategy: str
    metric: str
    score: Estimate | None
    worst: Estimate | None
    bytes_up: float
    bytes_down: float
    curve: Mapping[int, Estimate]
    """The metric after each round that was measured."""
    remark: str | None = None
    """That its seeds end in two groups, where they do."""

    @property
    def cells(self) -> tuple[str, ...]:
        """A line of the table."""
        count = str(self.score.count) if self.score else "0"
        sizes = (f"{self.bytes_up / 1e6:.3g}", f"{self.bytes_down / 1e6:.3g}")
        name = metric_label(self.metric)
        return (self.strategy, count, name, interval(self.score), interval(self.worst), *sizes)


def interval(estimate: Estimate | None) -> str:
    """A mean and half its 95 % interval by Student's t over seeds, which one seed has none of.

    >>> interval(Estimate.of([0.8, 0.9])), interval(Estimate.of([0.5])), interval(None)
    ('0.850 ± 0.635', '0.500', 'not measured')
    """
    if estimate is None:
        return "not measured"
    return f"{estimate.mean:.3f}" + ("" if estimate.half is None else f" ± {estimate.half:.3f}")


def compared(results: Results) -> list[Compared]:
    """A line for every strategy that has a complete run, in the order in which they were asked for."""
    metric = headline_of([Row.of(run, result, "") for run, result in results]) or ""
    by_strategy: dict[str, list[tuple[Planned, RunResult]]] = {}
    for run, result in results:
        by_strategy.setdefault(run.values[KEY], []).append((run, result))
    return [_line(name, metric, group) for name, group in by_strategy.items()]


def _line(name: str, metric: str, group: Sequence[tuple[Planned, RunResult]]) -> Compared:
    finals = [Row.of(run, result, "").metrics.get(metric) for run, result in group]
    scores = [score for score in finals if score is not None]
    curves: dict[int, list[float]] = {}
    for _, result in group:
        for line in result.rounds:
            if (value := finite(line["metrics"].get(metric))) is not None:
                curves.setdefault(int(line["round"]), []).append(value)
    return Compared(
        name,
        metric,
        _estimate(scores),
        _estimate([worst for _, result in group if (worst := worst_of_run(result, metric)) is not None]),
        Estimate.of([result.bytes_up for _, result in group]).mean,
        Estimate.of([result.bytes_down for _, result in group]).mean,
        {round: Estimate.of(values) for round, values in sorted(curves.items())},
        remark_on(name, scores),
    )


def _estimate(values: Sequence[float]) -> Estimate | None:
    return Estimate.of(values) if values else None


def worst_of_run(result: RunResult, metric: str) -> float | None:
    """The final model's metric over the tenth of the clients for whom it is worst, if any measured."""
    values = [finite(client.get(metric)) for client in result.final["clients"].values()]
    known = [value for value in values if value is not None]
    return worst_tenth(known, metric) if known else None


def write_comparison(folder: Path, results: Results, name: str, *, missing: int) -> dict[str, Path]:
    """Write compare.csv (a line a run), compare.md (the table) and compare.png; `missing` runs are not."""
    lines = compared(results)
    files = {"runs": folder / "compare.csv", "table": folder / "compare.md"}
    replace_synced(files["runs"], _as_csv(results, lines[0].metric).encode())
    replace_synced(files["table"], _as_markdown(lines, name, missing).encode())
    if any(line.curve for line in lines):
        files["picture"] = folder / "compare.png"
        replace_synced(files["picture"], picture(name, lambda axes: draw(axes, lines)))
    return files


def _as_markdown(lines: Sequence[Compared], name: str, missing: int) -> str:
    parts = [
        f"# {name}: strategies compared",
        "Means with 95 % intervals over seeds (Student's t). A seed's data, cohorts and batches are the same"
        " for every strategy. Bytes are those of a whole run.",
        markdown_table(HEAD, [line.cells for line in lines]),
        *(line.remark or "" for line in lines),
        f"{missing} runs are not complete and are left out." if missing else "",
        "![The metric over rounds](compare.png)" if any(line.curve for line in lines) else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _as_csv(results: Results, metric: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = [
        "strategy",
        "seed",
        metric or "metric",
        "worst_tenth",
        "bytes_up",
        "bytes_down",
        "model_sha256",
        "path",
    ]
    writer.writerow(head)
    for run, result in results:
        score, worst = Row.of(run, result, "").metrics.get(metric), worst_of_run(result, metric)
        sizes = [result.bytes_up, result.bytes_down]
        writer.writerow(
            [run.values[KEY], run.job.seed, score, worst, *sizes, result.model_sha256, run.folder]
        )
    return text.getvalue()


def draw(axes: Axes, lines: Sequence[Compared]) -> None:
    """Each strategy's mean after every measured round, with the band of its 95 % intervals."""
    for number, line in enumerate(lines):
        colour, xs = COLOURS[number % len(COLOURS)], list(line.curve)
        dashes = ("-", "--", ":")[number // len(COLOURS) % 3]
        curve = list(line.curve.values())
        axes.plot(xs, [f.mean for f in curve], dashes, color=colour, linewidth=2.2, label=line.strategy)
        low, high = ([f.mean + sign * (f.half or 0.0) for f in curve] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    metric = lines[0].metric
    axes.set_ylabel(metric_label(metric) + (" (lower is better)" if lower_is_better(metric) else ""))
    axes.set_xlabel("round")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=10)
