"""`report.html`: a run told to a person, in one self-contained file."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin, sqrt
from pathlib import Path
from typing import Any

from markupsafe import Markup

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.report.clients import ClientsSection, clients_section
from atoll.report.comparison import Comparison, comparison_of, row_name, whole_percent
from atoll.report.contributions import ContributionsSection, contributions_section
from atoll.report.plots import seconds_plot
from atoll.report.rounds import RoundsSection, rounds_section, series
from atoll.report.run_result import RunResult
from atoll.report.templates import fill_in
from atoll.report.text import (
    ENGINES,
    better,
    comparison_sentence,
    duration,
    how_chosen,
    how_it_went,
    metric_label,
    metric_value,
    on_what_data,
    pluralize,
    quantile,
    simulated_facts,
    simulated_rounds,
    size,
    what_it_cost,
    what_was_private,
    what_was_tuned,
    who_was_hostile,
)
from atoll.system.durable_files import replace_synced
from atoll.tasks.metric_values import lower_is_better

ISLANDS = 60
"""Clients above which the picture of the atoll stops growing."""

SET_ASIDE_SHOWN = 300

SHOWN_OF_A_TEXT = 500
"""Letters of a prompt or of what was written that are shown."""

Facts = tuple[tuple[str, str], ...]
"""Names and values, in the order in which they are shown."""


@dataclass(frozen=True)
class Island:
    """A client in the picture of the atoll: an area that grows with its examples."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class ModelRow:
    """One model of the comparison; its bar is as long as its headline metric is large."""

    kind: str
    name: str
    bar_percent: float
    values: tuple[str, ...]


@dataclass(frozen=True)
class ModelsSection:
    """The federated model beside its baselines; of each metric its name and which way it improves."""

    sentence: str
    on_test_set: bool
    metrics: tuple[tuple[str, str], ...]
    rows: tuple[ModelRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SetAsideSection:
    """Updates that didn't enter the model: (round, client, reason), and how many more there are."""

    sentence: str
    shown: tuple[tuple[str, str, str], ...] = ()
    left_out: str = ""


@dataclass(frozen=True)
class CostSection:
    """Traffic, time and memory, and the seconds of each round."""

    lines: Facts
    plots: tuple[Markup, ...]


@dataclass(frozen=True)
class WrittenSample:
    """A held-out prompt, what the model wrote for it before and after training, and the data's own text."""

    prompt: str
    before: str
    after: str
    reference: str


@dataclass(frozen=True)
class OriginSection:
    """What repeats the run, and what its bits depend on; `job_text` is empty where the file is gone."""

    command: str
    job_hash: str
    model_sha256: str
    seed: str
    engine: str
    backbone_from: str
    machine: Facts
    job_text: str


@dataclass(frozen=True)
class Report:
    """All that the template is given: sentences, numbers written out, plots. It knows of no result."""

    name: str
    lead: str
    client_count: str
    islands: tuple[Island, ...]
    tiles: Facts
    story: tuple[str, ...]
    models: ModelsSection
    samples: tuple[WrittenSample, ...]
    rounds: RoundsSection
    clients: ClientsSection | None
    contributions: ContributionsSection | None
    set_aside: SetAsideSection
    cost: CostSection
    origin: OriginSection


def write_report(folder: Path, result: RunResult) -> None:
    """Write `folder/report.html` whole or not at all; the same result gives the same bytes."""
    replace_synced(folder / "report.html", page(folder, result).encode())


def page(folder: Path, result: RunResult) -> str:
    """The whole document."""
    return fill_in("report.html.j2", report=report_of(folder, result))


def report_of(folder: Path, result: RunResult) -> Report:
    """What the page says of a result and of the job in the same folder."""
    compared = comparison_of(result)
    job = _job(folder)
    return Report(
        name=result.name,
        lead=what_was_tuned(result, job),
        client_count=pluralize(len(result.final["clients"]), "client"),
        islands=_islands(result.final["clients"]),
        tiles=_tiles(result, compared),
        story=(
            on_what_data(result, job),
            how_it_went(result) + how_chosen(job) + who_was_hostile(job),
            what_it_cost(result),
            what_was_private(result.privacy),
        ),
        models=_models(result, compared),
        samples=_samples(result),
        rounds=rounds_section(result.rounds, compared),
        clients=clients_section(result, compared.headline),
        contributions=contributions_section(result.contributions),
        set_aside=_set_aside(result),
        cost=_cost(result),
        origin=_origin(folder, result),
    )


def _job(folder: Path) -> Job | None:
    """The resolved job beside the report, where this version of Atoll can read it."""
    try:
        return Job.load(folder / "job.toml")
    except ConfigError:
        return None


def _islands(clients: dict[str, dict[str, Any]]) -> tuple[Island, ...]:
    """A ring of islands around one lagoon, on a square of 200 units."""
    shown = [c["examples"] or 0 for _, c in sorted(clients.items())][:ISLANDS]
    largest = max(shown, default=1) or 1
    room = min(10.0, 78 * sin(pi / max(2, len(shown))) * 0.95)
    angles = (2 * pi * i / len(shown) - pi / 2 for i in range(len(shown)))
    return tuple(
        Island(100 + 82 * cos(angle), 100 + 82 * sin(angle), max(1.6, room * sqrt(examples / largest)))
        for angle, examples in zip(angles, shown, strict=True)
    )


def _tiles(result: RunResult, compared: Comparison) -> Facts:
    """The run's most telling numbers."""
    metric, share = compared.headline, compared.gap_closed
    tiles = [("clients", f"{result.population:,}"), ("rounds", f"{len(result.rounds):,}")]
    if share is not None and share >= 0:
        tiles.insert(0, ("of the gap closed", whole_percent(min(share, 1.0))))
    if metric is not None:
        word = metric_label(metric)
        tiles.insert(0, (f"federated {word}", metric_value(metric, compared.value("federated", metric))))
    return (
        *tiles,
        ("sent to the server", size(result.bytes_up)),
        ("the whole run", duration(result.seconds)),
    )


def _models(result: RunResult, compared: Comparison) -> ModelsSection:
    """The comparison's sentence and its table."""
    rows = (
        ModelRow(
            kind=row,
            name=row_name(row),
            bar_percent=100 * _share_of_bar(compared, row),
            values=tuple(metric_value(m, compared.value(row, m)) for m in compared.metrics),
        )
        for row in compared.rows
    )
    return ModelsSection(
        sentence=comparison_sentence(compared),
        on_test_set=compared.on_test_set,
        metrics=tuple((metric_label(m), better(m)) for m in compared.metrics),
        rows=tuple(rows),
        notes=(*compared.remarks, *result.notes),
    )


def _samples(result: RunResult) -> tuple[WrittenSample, ...]:
    """What a language model wrote, as it is shown: of long texts the end of a prompt, else the beginning."""
    return tuple(
        WrittenSample(
            prompt=_ending(sample["prompt"]),
            before=_beginning(sample["before"]),
            after=_beginning(sample["after"]),
            reference=_beginning(sample["reference"]),
        )
        for sample in result.samples or ()
    )


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_OF_A_TEXT else text[:SHOWN_OF_A_TEXT] + "…"


def _ending(text: str) -> str:
    return text if len(text) <= SHOWN_OF_A_TEXT else "…" + text[-SHOWN_OF_A_TEXT:]


def _share_of_bar(compared: Comparison, row: str) -> float:
    """The headline metric as a share of 1, or of the largest value where that is larger or an error."""
    metric = compared.headline or ""
    values = [v for name in compared.rows if (v := compared.value(name, metric)) is not None and v >= 0]
    full = max([0.0 if lower_is_better(metric) else 1.0, *values]) or 1.0
    return max(0.0, (compared.value(row, metric) or 0.0) / full)


def _set_aside(result: RunResult) -> SetAsideSection:
    """The updates that were not merged, or that there were none."""
    entries = [
        (line["round"], client, reason)
        for line in result.rounds
        for client, reason in line["set_aside"].items()
    ]
    if not entries:
        arrived = "arrived in time" if result.simulated_seconds else "was asked for arrived,"
        return SetAsideSection(f"None: every update that {arrived} passed the checks and was merged.")
    rounds = len({round for round, _, _ in entries})
    more = len(entries) - SET_ASIDE_SHOWN
    return SetAsideSection(
        f"{pluralize(len(entries), 'update')} in {pluralize(rounds, 'round')} did not enter the model.",
        shown=tuple((f"{round:,}", client, reason) for round, client, reason in entries[:SET_ASIDE_SHOWN]),
        left_out=f"{more:,} more; all are in result.json." if more > 0 else "",
    )


def _cost(result: RunResult) -> CostSection:
    """What the run took, on this machine's clock and, where devices were simulated, on theirs."""
    seconds = series(result.rounds, "seconds", of_round=True)
    ordered = sorted(value for _, value in seconds)
    trained = result.clients_trained
    lines = [
        ("up to the server", size(result.bytes_up)),
        ("down to the clients", size(result.bytes_down)),
        ("one client's update", size(result.bytes_up / trained) if trained else "none was merged"),
        ("updates merged", f"{trained:,}"),
        ("the whole run", duration(result.seconds)),
        ("a round, median", duration(quantile(ordered, 0.5) if ordered else None)),
        ("the slowest round", duration(max(ordered, default=None))),
        ("most memory held", size(result.peak_rss_mb * 2**20)),
    ]
    plots = [seconds_plot("seconds", "Seconds of each round", seconds)] if seconds else []
    if result.simulated_seconds:
        lines += simulated_facts(result)
        plots.append(seconds_plot("simulated", "Simulated seconds of each round", simulated_rounds(result)))
    return CostSection(tuple(lines), tuple(plots))


def _origin(folder: Path, result: RunResult) -> OriginSection:
    """The command that repeats the run, and what identifies it."""
    engine = result.engine
    option = f" --engine {engine}" if engine in ENGINES else ""
    return OriginSection(
        command=f"atoll simulate job.toml{option} --out again",
        job_hash=result.job_hash,
        model_sha256=result.model_sha256,
        seed=str(result.seed),
        engine=ENGINES.get(engine, engine),
        backbone_from=result.backbone["origin"],
        machine=_machine(result.machine),
        job_text=_job_text(folder),
    )


def _machine(machine: dict[str, Any]) -> Facts:
    """What is recorded of the machine, the versions of packages among it."""
    lines: list[tuple[str, str]] = []
    for name, value in machine.items():
        if isinstance(value, dict):
            lines += [(package, str(version)) for package, version in value.items()]
        else:
            lines.append((name.replace("_", " "), str(value)))
    return tuple(lines)


def _job_text(folder: Path) -> str:
    """The job file as it lies beside the report, empty where it can't be read."""
    try:
        return (folder / "job.toml").read_text("utf-8", errors="replace")
    except OSError:
        return ""
