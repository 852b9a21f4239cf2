"""What a person sees while a run works, and at its end."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from atoll.server.events import (
    BaselinesBegun,
    ClientsFound,
    Event,
    FinalEvaluationBegun,
    RoundEnded,
    RunResumed,
    StageBegun,
)
from atoll.sim.engines.events import AuditAdvanced, ExecutionChosen, PopulationRead

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from atoll.report.run_result import RunResult

PIPED_WIDTH = 160
"""Columns of a table that goes to a file or a pipe, where nothing has to fit a screen."""
EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@cache
def out() -> Console:
    """Where results go; made at the first word, for rich takes longer to import than help to print."""
    return console()


@cache
def err() -> Console:
    """Where complaints go."""
    return console(stderr=True)


def console(*, stderr: bool = False) -> Console:
    """A console that fits its terminal, or is wide and plain where there is none."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    return Console(stderr=stderr, width=None if is_terminal else PIPED_WIDTH)


def escape(text: str) -> str:
    """Text whose brackets mean nothing to a console."""
    from rich.markup import escape as escaped

    return escaped(text)


def sanitize(text: str) -> str:
    """Text from outside, in one line, so that it can't format, hide or forge what the terminal shows."""
    return escape("".join(c if c.isprintable() else "�" for c in " ".join(text.split("\n"))))


class OneLine(logging.Handler):
    """A line for every warning; on a terminal above the progress, else on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        place = out() if out().is_terminal and err().is_terminal else err()
        what = record.levelname.lower()
        place.print(f"[yellow]{what}:[/] {sanitize(record.getMessage())}", highlight=False, soft_wrap=True)


class ProgressView(Protocol):
    """Where progress is shown."""

    def say(self, line: str) -> None:
        """A line that stays."""
        ...

    def show(self, name: str, done: int, total: int | None, note: str) -> None:
        """How far something has got; without a total, that it goes on."""
        ...

    def close(self) -> None:
        """Nothing is to come."""
        ...


@dataclass
class Bars:
    """Bars that move, for a terminal; nothing is drawn before there is something to show."""

    display: Progress
    _bars: dict[str, TaskID] = field(default_factory=dict)
    _total: dict[str, int | None] = field(default_factory=dict)

    def say(self, line: str) -> None:
        self.display.console.print(line, highlight=False, soft_wrap=True)

    def show(self, name: str, done: int, total: int | None, note: str) -> None:
        if not self._bars:
            self.display.start()
        if name not in self._bars or self._total[name] != total:
            self._bars[name] = self.display.add_task(name, total=total, note=note)
            self._total[name] = total
        self.display.update(self._bars[name], completed=done, note=note)

    def close(self) -> None:
        for name, total in self._total.items():
            if total is None:
                self.display.remove_task(self._bars[name])
        if self._bars:
            self.display.stop()


@dataclass
class Lines:
    """A plain line now and then, for a file or a pipe: the first, the last, and one every few seconds."""

    every: float = EVERY
    _last: dict[str, float] = field(default_factory=dict)

    def say(self, line: str) -> None:
        out().print(line, highlight=False, soft_wrap=True)
        out().file.flush()

    def show(self, name: str, done: int, total: int | None, note: str) -> None:
        now = time.monotonic()
        if name in self._last and done != total and now - self._last[name] < self.every:
            return
        self._last[name] = now
        count = "" if total is None else f"{done} of {total}"
        self.say("  ".join(part for part in (f"{name:<8}", count, note) if part))

    def close(self) -> None: ...


interrupted = threading.Event()
"""Set by Ctrl-C. Python drops an exception that is raised while an object is destroyed, so
raising one there is not enough: every step of a run looks here as well."""


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed and the first one was lost; in the main thread."""
    if interrupted.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


@dataclass
class Watcher:
    """Follows a run's steps on a gauge."""

    gauge: ProgressView
    rounds: int

    def features(self, done: int, total: int) -> None:
        """Progress of the feature extraction."""
        stop_if_asked()
        self.gauge.show("features", done, total, "every example once, then cached")

    def on_event(self, event: Event) -> None:
        """One step of the run."""
        stop_if_asked()
        match event:
            case ExecutionChosen():
                self.gauge.say(f"training  {event.mode}")
            case PopulationRead():
                self._population(event.population)
            case ClientsFound():
                self._clients_found(event)
            case RunResumed():
                self.gauge.say(f"resumed   after round {event.round} of {self.rounds}")
            case StageBegun():
                self.gauge.say(f"tuning    {event.tuning}, from round {event.round + 1} on")
            case RoundEnded():
                self._round(event.line)
            case BaselinesBegun():
                self.gauge.show("finish", 0, None, "baselines")
            case AuditAdvanced():
                self.gauge.show("audit", event.done, event.total, "rounds again, with canaries")
            case FinalEvaluationBegun():
                self.gauge.show("finish", 0, None, "final measurements")

    def _population(self, population: Any) -> None:
        for note in population.notes:
            self.gauge.say(f"note      {sanitize(note)}")
        for counts in population.source_counts:
            self.gauge.say(f"counts    {sanitize(counts.description)}")
        self.gauge.say(
            f"data      {len(population.train)} examples to train on, {len(population.test)} held out"
        )

    def _clients_found(self, event: ClientsFound) -> None:
        backbone = event.backbone
        self.gauge.say(f"backbone  {sanitize(backbone.name)}, weights from {sanitize(backbone.origin)}")
        if event.inputs_description:
            self.gauge.say(f"inputs    {sanitize(event.inputs_description)}")
        from atoll.data.diagnostics import total

        roster = event.roster
        self.gauge.say(f"clients   {len(roster.sizes)}, {roster.sizes_description}")
        for counts in total(one for sizes in roster.counts.values() for one in sizes):
            self.gauge.say(f"counts    {sanitize(counts.description)}")

    def _round(self, line: Mapping[str, Any]) -> None:
        from atoll.tasks.metric_values import format_values

        parts = [] if line["loss"] is None else [f"train loss {line['loss']:.3f}"]
        parts += format_values({name: v for name, v in line["metrics"].items() if name != "loss"})
        if line.get("staleness", {}).get("max"):
            parts.append(f"up to {line['staleness']['max']} rounds late")
        if line["set_aside"]:
            parts.append(f"{len(line['set_aside'])} set aside")
        self.gauge.show("rounds", line["round"], self.rounds, ", ".join(parts))


@contextmanager
def watching(rounds: int) -> Iterator[Watcher]:
    """A live display for the time of a run; plain lines where there is no terminal."""
    shown = gauge()
    try:
        yield Watcher(shown, rounds)
    finally:
        shown.close()


def gauge() -> ProgressView:
    """Bars on a terminal, else lines."""
    return Bars(_bars()) if out().is_terminal else Lines()


def _bars() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=out())


def comparison(result: RunResult) -> Table | str:
    """The baselines and the federated model on the same test set, or that nothing was measured."""
    from rich.table import Table

    from atoll.report.comparison import comparison_of, row_name
    from atoll.report.text import NOT_MEASURED
    from atoll.tasks.metric_values import UNDEFINED

    compared = comparison_of(result)
    if not compared.rows:
        return NOT_MEASURED
    table = Table(title=f"{result.name}: {result.task}, {result.strategy}", title_justify="left")
    table.add_column("model")
    for metric in compared.metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for name in compared.rows:
        values = (compared.value(name, metric) for metric in compared.metrics)
        style = "bold" if name == "federated" else ""
        table.add_row(row_name(name), *(UNDEFINED if v is None else f"{v:.3f}" for v in values), style=style)
    if compared.remarks:
        table.caption, table.caption_justify = "\n".join(compared.remarks), "left"
    return table


def print_summary(result: RunResult, run: Any) -> None:
    """What came out, and where it lies."""
    from atoll.report.text import duration, what_was_private

    out().print()
    out().print(comparison(result), highlight=False)
    for note in result.notes:
        out().print(f"note           {sanitize(note)}", highlight=False, soft_wrap=True)
    if result.simulated_seconds:
        times = f"{duration(result.simulated_seconds)} on the devices, {duration(result.seconds)} here"
        out().print(f"simulated time  {times}", highlight=False)
    if result.privacy["unit"] != "none":
        out().print(sanitize(what_was_private(result.privacy)), highlight=False, soft_wrap=True)
    for name, what in (
        ("model sha256", result.model_sha256),
        ("run directory", run),
        ("report", run / "report.html"),
    ):
        out().print(f"{name:<13}  {sanitize(str(what))}", highlight=False, soft_wrap=True)
