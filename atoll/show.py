"""What a person sees while a run works, and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.comparison import NAMES, comparison_of

out = Console()
err = Console(stderr=True)

WIDE = 100
"""Rows of a table above which only the ends are shown."""


@dataclass
class Watcher:
    """Follows a run's steps on a progress display."""

    display: Progress
    rounds: int
    _bars: dict[str, TaskID] = field(default_factory=dict)

    def features(self, done: int, total: int) -> None:
        """Progress of the feature extraction."""
        key = f"features {total}"
        if key not in self._bars:
            self._bars[key] = self.display.add_task(
                "features", total=total, note="every example once, then cached"
            )
        self.display.update(self._bars[key], completed=done)

    def step(self, name: str, what: dict[str, Any]) -> None:
        """One step of the run."""
        match name:
            case "population":
                self._population(what["population"])
            case "hello":
                self._hello(what)
            case "resumed":
                self.display.print(f"resumed after round {what['round']}")
                self._round_bar(what["round"])
            case "round":
                self._round(what)
            case "baselines":
                self._bars["finish"] = self.display.add_task("baselines", total=None, note="")
            case "finish":
                self.display.update(self._bars["finish"], description="final measurements")

    def close(self) -> None:
        """Take the last spinner down."""
        if "finish" in self._bars:
            self.display.remove_task(self._bars["finish"])

    def _population(self, population: Any) -> None:
        for note in population.notes:
            self.display.print(f"note: {escape(note)}", highlight=False)
        self.display.print(
            f"data      {len(population.train)} examples to train on, {len(population.test)} held out"
        )

    def _hello(self, what: dict[str, Any]) -> None:
        backbone, hellos = what["backbone"], what["hellos"]
        self.display.print(
            f"backbone  {escape(backbone.name)}, weights from {escape(backbone.origin)}", soft_wrap=True
        )
        taking = [h for h in hellos if not h.refusal]
        sizes = sorted(h.num_examples for h in taking)
        spread = f", {sizes[0]} to {sizes[-1]} examples each" if sizes else ""
        self.display.print(f"clients   {len(taking)}{spread}")
        for hello in (h for h in hellos if h.refusal):
            self.display.print(
                f"[yellow]{escape(hello.client)} does not take part: {escape(hello.refusal)}[/]"
            )

    def _round_bar(self, done: int) -> TaskID:
        if "rounds" not in self._bars:
            self._bars["rounds"] = self.display.add_task("rounds", total=self.rounds, completed=done, note="")
        return self._bars["rounds"]

    def _round(self, line: dict[str, Any]) -> None:
        bar = self._round_bar(line["round"] - 1)
        parts = [] if line["loss"] is None else [f"loss {line['loss']:.3f}"]
        parts += [f"{name} {value:.3f}" for name, value in line["metrics"].items() if name != "loss"]
        if line["set_aside"]:
            parts.append(f"{len(line['set_aside'])} set aside")
        self.display.update(bar, completed=line["round"], note=", ".join(parts))


@contextmanager
def watching(rounds: int) -> Iterator[Watcher]:
    """A live display for the time of a run; plain lines where there is no terminal."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=out) as display:
        watcher = Watcher(display, rounds)
        try:
            yield watcher
        finally:
            watcher.close()


def comparison(result: dict[str, Any]) -> Table:
    """The baselines and the federated model on the same test set, a row each."""
    compared = comparison_of(result)
    table = Table(title=f"{result['name']}: {result['task']}, {result['strategy']}", title_justify="left")
    table.add_column("model")
    for metric in compared.metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for name in compared.rows:
        values = (compared.value(name, metric) for metric in compared.metrics)
        style = "bold" if name == "federated" else ""
        table.add_row(NAMES[name], *("-" if v is None else f"{v:.3f}" for v in values), style=style)
    return table


def ending(result: dict[str, Any], run: Any) -> None:
    """What came out, and where it lies."""
    out.print()
    out.print(comparison(result))
    for note in result["notes"]:
        out.print(f"note: {escape(note)}", highlight=False)
    out.print(f"model sha256   {result['model_sha256']}", highlight=False, soft_wrap=True)
    out.print(f"run directory  {run}", highlight=False, soft_wrap=True)
    out.print(f"report         {run / 'report.html'}", highlight=False, soft_wrap=True)
