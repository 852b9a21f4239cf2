"""`report.html`: a run told to a person, in one self-contained file."""

from __future__ import annotations

from html import escape
from math import cos, pi, sin, sqrt
from pathlib import Path
from typing import Any

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.report.clients import clients_section
from atoll.report.comparison import (
    NAMES,
    Comparison,
    comparison_of,
    finite,
    lower_is_better,
    row_name,
    whole_percent,
)
from atoll.report.html import Markup, Table, code, facts, figure, paragraph, section
from atoll.report.plots import Curve, curves_plot, seconds_plot
from atoll.report.style import STYLE
from atoll.report.text import (
    ENGINES,
    better,
    comparison_sentence,
    duration,
    how_it_went,
    metric_value,
    metric_words,
    on_what_data,
    pluralize,
    population,
    quantile,
    simulated_facts,
    simulated_rounds,
    size,
    what_it_cost,
    what_was_private,
    what_was_tuned,
)
from atoll.system.durable_files import replace_synced

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Held by the browser: the page runs no script and asks for nothing."""

ISLANDS = 60
"""Clients above which the picture of the atoll stops growing."""

SET_ASIDE_SHOWN = 300
PLOTTED = 1000
"""Rounds above which a curve is thinned."""


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """Write `folder/report.html` whole or not at all; the same result gives the same bytes."""
    replace_synced(folder / "report.html", page(folder, result).encode())


def page(folder: Path, result: dict[str, Any]) -> str:
    """The whole document."""
    compared = comparison_of(result)
    name = result.get("name", "run")
    job = _job(folder)
    parts = (
        _tiles(result, compared),
        _story(result, job),
        _comparison_section(result, compared),
        _rounds_section(result, compared),
        clients_section(result, compared.headline),
        _set_aside_section(result),
        _cost_section(result),
        _reproduce_section(folder, result),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)}: Atoll run report</title>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{STYLE}</style></head>'
        f"<body>{_header(name, result, job)}<main>{''.join(parts)}</main>"
        "<footer>Written by Atoll. This file is complete in itself: it loads nothing and runs no script."
        "</footer></body></html>\n"
    )


def _job(folder: Path) -> Job | None:
    """The resolved job beside the report, where this version of Atoll can read it."""
    try:
        return Job.load(folder / "job.toml")
    except ConfigError:
        return None


def _header(name: str, result: dict[str, Any], job: Job | None) -> Markup:
    lead = paragraph(what_was_tuned(result, job), "lead")
    return Markup(
        f'<header><div><p class="eyebrow">Atoll run report</p><h1>{escape(name)}</h1>{lead}</div>'
        f"{_atoll(result['final']['clients'])}</header>"
    )


def _story(result: dict[str, Any], job: Job | None) -> Markup:
    """The job in words."""
    told = (
        on_what_data(result, job),
        how_it_went(result),
        what_it_cost(result),
        what_was_private(result["privacy"]),
    )
    return Markup(f'<div class="story">{"".join(paragraph(sentence) for sentence in told)}</div>')


def _tiles(result: dict[str, Any], compared: Comparison) -> Markup:
    metric, share = compared.headline, compared.gap_closed
    tiles = [("clients", f"{population(result):,}"), ("rounds", f"{len(result['rounds']):,}")]
    if share is not None and share >= 0:
        tiles.insert(0, ("of the gap closed", whole_percent(min(share, 1.0))))
    if metric is not None:
        word = metric_words(metric)
        tiles.insert(0, (f"federated {word}", metric_value(metric, compared.value("federated", metric))))
    tiles += [
        ("sent to the server", size(result["bytes_up"])),
        ("the whole run", duration(result["seconds"])),
    ]
    return facts(tiles, "tiles headline")


def _atoll(clients: dict[str, dict[str, Any]]) -> Markup:
    """A ring of islands around one lagoon: an island is a client, its area grows with its examples."""
    shown = [c["examples"] or 0 for _, c in sorted(clients.items())][:ISLANDS]
    largest = max(shown, default=1) or 1
    room = min(10.0, 78 * sin(pi / max(2, len(shown))) * 0.95)
    islands = []
    for i, examples in enumerate(shown):
        angle = 2 * pi * i / len(shown) - pi / 2
        radius = max(1.6, room * sqrt(examples / largest))
        x, y = 100 + 82 * cos(angle), 100 + 82 * sin(angle)
        islands.append(f'<circle class="island" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
    label = (
        f"{pluralize(len(clients), 'client')} drawn as islands around one lagoon; size: validation examples"
    )
    lagoon = '<circle class="lagoon" cx="100" cy="100" r="62"/>'
    head = f'<svg class="atoll" viewBox="0 0 200 200" role="img" aria-label="{label}">'
    return Markup(f"{head}{lagoon}{''.join(islands)}</svg>")


def _comparison_section(result: dict[str, Any], compared: Comparison) -> Markup:
    where = (
        "on the server's test set"
        if compared.on_test_set
        else "mean over the clients' own validation examples, weighted by how many each has"
    )
    head = ["model", *(_with_direction(m) for m in compared.metrics)]
    if compared.headline is not None:
        head.insert(1, "")
    table = Table(f"Federated learning beside its baselines, {where}", head, style="compare")
    for row in compared.rows:
        cells: list[str] = [metric_value(m, compared.value(row, m)) for m in compared.metrics]
        if compared.headline is not None:
            cells.insert(0, _bar(compared, row))
        table.row(row_name(row), *cells, style=f"{row} chief" if row == "federated" else row)
    notes = "".join(paragraph(f"Note: {note}", "note") for note in result.get("notes", []))
    return section(
        "Comparison",
        paragraph(comparison_sentence(compared), "reading"),
        table.html() if compared.rows else "",
        notes,
    )


def _with_direction(metric: str) -> Markup:
    return Markup(f"{escape(metric_words(metric))}<small>{better(metric)}</small>")


def _bar(compared: Comparison, row: str) -> Markup:
    metric = compared.headline or ""
    values = [v for name in compared.rows if (v := compared.value(name, metric)) is not None and v >= 0]
    full = max([0.0 if lower_is_better(metric) else 1.0, *values]) or 1.0
    share = max(0.0, (compared.value(row, metric) or 0.0) / full)
    return Markup(f'<span class="bar" aria-hidden="true"><i style="width:{share * 100:.1f}%"></i></span>')


def _rounds_section(result: dict[str, Any], compared: Comparison) -> Markup:
    training = _series(result["rounds"], "loss", of_round=True)
    names = list(dict.fromkeys(m for line in result["rounds"] for m in line["metrics"]))
    if training and "loss" not in names:
        names.append("loss")
    plots = [_metric_plot(result, compared, name, training if name == "loss" else []) for name in names]
    figures = "".join(figure(plot) for plot in plots if plot)
    if not figures:
        return section("Round by round", paragraph("No round recorded a loss or a metric."))
    where = "on the server's test set" if compared.on_test_set else "over all clients' validation examples"
    said = f"The global model after each round that was evaluated, {where}."
    if training:
        said += " The training loss is the cohort's own, on the examples it trained on."
    key = _key(compared, bool(training))
    return section("Round by round", paragraph(said), key, f'<div class="plots">{figures}</div>')


def _series(rounds: list[dict[str, Any]], name: str, *, of_round: bool = False) -> list[tuple[float, float]]:
    """(round, value) where there is a value; thinned where there are very many."""
    lines = ((line["round"], (line if of_round else line["metrics"]).get(name)) for line in rounds)
    points = [(float(round), v) for round, value in lines if (v := finite(value)) is not None]
    step = -(-len(points) // PLOTTED) or 1
    return points[: len(points) - 1 : step] + points[-1:]


def _metric_plot(
    result: dict[str, Any], compared: Comparison, metric: str, training: list[tuple[float, float]]
) -> str:
    points = _series(result["rounds"], metric)
    curves = [Curve(kind, p) for kind, p in (("training", training), ("federated", points)) if p]
    if not curves:
        return ""
    baselines = (r for r in compared.rows if r in NAMES and r != "federated" and compared.on_test_set)
    levels = {row: level for row in baselines if (level := compared.value(row, metric)) is not None}
    word = metric_words(metric)
    title = f"{word[0].upper()}{word[1:]} over rounds"
    return curves_plot(f"curve-{metric}", title, curves, levels, percent="accuracy" in metric)


def _key(compared: Comparison, training: bool) -> Markup:
    dashes = {"zero_shot": "2 3", "local_only": "7 4", "pooled": "11 3 2 3"}
    names = [
        (row, NAMES[row], dashes.get(row, ""))
        for row in compared.rows
        if row in NAMES and (compared.on_test_set or row == "federated")
    ]
    if training:
        names.append(("training", "training loss at the clients", ""))
    items = "".join(
        f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5h30" fill="none" stroke-width="2.2"'
        f' style="stroke:var(--{kind})" stroke-dasharray="{dash}"/></svg>{escape(name)}</li>'
        for kind, name, dash in names
    )
    return Markup(f'<ul class="key">{items}</ul>')


def _set_aside_section(result: dict[str, Any]) -> Markup:
    entries = [(line["round"], c, why) for line in result["rounds"] for c, why in line["set_aside"].items()]
    heading = "Updates set aside"
    if not entries:
        arrived = "arrived in time" if result.get("simulated_seconds") else "was asked for arrived,"
        passed = "passed the checks and was merged"
        return section(heading, paragraph(f"None: every update that {arrived} {passed}."))
    rounds = len({round for round, _, _ in entries})
    said = f"{pluralize(len(entries), 'update')} in {pluralize(rounds, 'round')} did not enter the model."
    table = Table(
        "Updates that were not merged, and why", ["round", "client", "reason"], texts=(1, 2), style="long"
    )
    for round, client, reason in entries[:SET_ASIDE_SHOWN]:
        table.row(f"{round:,}", client, reason)
    if len(entries) > SET_ASIDE_SHOWN:
        table.remark(f"{len(entries) - SET_ASIDE_SHOWN:,} more; all are in result.json.")
    return section(heading, paragraph(said), table.html())


def _cost_section(result: dict[str, Any]) -> Markup:
    seconds = _series(result["rounds"], "seconds", of_round=True)
    ordered = sorted(value for _, value in seconds)
    trained = result["clients_trained"]
    pairs = [
        ("up to the server", size(result["bytes_up"])),
        ("down to the clients", size(result["bytes_down"])),
        ("one client's update", size(result["bytes_up"] / trained) if trained else "none was merged"),
        ("updates merged", f"{trained:,}"),
        ("the whole run", duration(result["seconds"])),
        ("a round, median", duration(quantile(ordered, 0.5) if ordered else None)),
        ("the slowest round", duration(max(ordered, default=None))),
        ("most memory held", size(result["peak_rss_mb"] * 2**20)),
    ]
    plot = figure(seconds_plot("seconds", "Seconds of each round", seconds)) if seconds else ""
    if result.get("simulated_seconds"):
        pairs += simulated_facts(result)
        plot += figure(seconds_plot("simulated", "Simulated seconds of each round", simulated_rounds(result)))
    note = "Traffic counts the trained tensors' values, without the messages' wrapping."
    return section(
        "Traffic, time and memory",
        f'<div class="row"><div>{facts(pairs)}{paragraph(note, "note")}</div>{plot}</div>',
    )


def _reproduce_section(folder: Path, result: dict[str, Any]) -> Markup:
    machine = result.get("machine", {})
    identity = [
        ("job hash", code(result["job_hash"])),
        ("model SHA-256", code(result["model_sha256"])),
        ("seed", str(result["seed"])),
        ("engine", ENGINES.get(result["engine"], result["engine"])),
        ("backbone from", result.get("backbone", {}).get("origin", "not recorded")),
    ]
    told = (
        "The job file beside this report replays the run. On the same kind of processor, with the same"
        " versions, the same seed gives the same model SHA-256, whatever the engine, however many workers."
    )
    engine = f" --engine {result['engine']}" if result["engine"] in ENGINES else ""
    commands = f"<pre><code>atoll simulate job.toml{engine} --out again</code></pre>"
    return section(
        "Reproduce this run",
        paragraph(told),
        commands,
        facts(identity),
        _machine_table(machine),
        _job_text(folder),
    )


def _machine_table(machine: dict[str, Any]) -> str:
    if not machine:
        return ""
    table = Table("What the bits depend on besides the job", ["", "this run"], texts=(1,), style="narrow")
    for name, value in machine.items():
        if isinstance(value, dict):
            for package, version in value.items():
                table.row(package, str(version))
        else:
            table.row(name.replace("_", " "), str(value))
    return table.html()


def _job_text(folder: Path) -> str:
    try:
        text = (folder / "job.toml").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    summary = "<summary>job.toml, with every default written out</summary>"
    return f"<h3>The job</h3><details>{summary}<pre><code>{escape(text)}</code></pre></details>"
