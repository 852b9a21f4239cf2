"""What a sweep leaves behind: a table for machines, a picture, and a page with what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.report.comparison import finite
from atoll.report.text import metric_label
from atoll.sim.sweep.grid import describe_combination, format_value
from atoll.sim.sweep.modes import remark_on
from atoll.sim.sweep.plot import frontier_png
from atoll.sim.sweep.results import (
    REFERENCES,
    Row,
    as_csv,
    combinations,
    describe_estimate,
    headline_of,
    losses,
    reference,
    scale_of,
    scores,
    sentence,
    table,
)
from atoll.sim.sweep.selection import Pick, describe_selection, selections
from atoll.system.durable_files import replace_synced

CHARGED_ALONE = (
    "Every run of this sweep was charged on its own. Whoever looks at several private results on the same"
    " data, and picks one, has spent more than any of them says: see docs/sweep.md."
)
PROTECTS_NOBODY = "The noise of these runs was seeded, for research: they protect nobody."


@dataclass(frozen=True)
class Written:
    """What is said at the end, and which files there are."""

    lines: tuple[str, ...]
    files: Mapping[str, Path]


def write_sweep(folder: Path, rows: Sequence[Row], name: str, *, missing: int) -> Written:
    """Write sweep.csv, frontier.png and sweep.md of the rows that are there; `missing` runs are not."""
    chosen = selections(rows)
    lines = tuple(sweep_summary(rows, chosen, missing))
    files = {"table": folder / "sweep.csv", "page": folder / "sweep.md"}
    replace_synced(files["table"], as_csv(rows).encode())
    is_drawn = bool(scores(rows) and rows[0].values)
    if is_drawn:
        files["picture"] = folder / "frontier.png"
        replace_synced(files["picture"], frontier_png(rows, name))
    page = _page(rows, name, lines, has_picture=is_drawn)
    replace_synced(files["page"], page.encode())
    return Written(lines, files)


def sweep_summary(rows: Sequence[Row], chosen: Sequence[Pick], missing: int) -> list[str]:
    """The sentence, the references, what picking costs, and what is to be kept in mind."""
    lines = [sentence(rows)]
    for name, label in REFERENCES.items():
        by_key = reference(rows, name)
        if by_key is not None:
            lines.append(f"For comparison, {label}: {describe_estimate(by_key)}.")
    lines += _remarks_on_seeds(rows)
    lines += [describe_selection(pick) for pick in chosen]
    private = [row for row in rows if row.is_private]
    if private and not all(row.privacy["seeded_noise"] for row in private):
        lines.append(CHARGED_ALONE)
    elif private:
        lines.append(PROTECTS_NOBODY)
    early = sum(bool(row.privacy.get("ended_early")) for row in private)
    if early:
        lines.append(f"{early} runs ended before their last round, for their budget was spent.")
    if missing:
        lines.append(f"{missing} runs of the grid are not complete and are left out.")
    return lines


def _remarks_on_seeds(rows: Sequence[Row]) -> list[str]:
    """A line for each combination whose seeds end in two groups; folds differ in more than their seed."""
    if rows[0].job.data.folds is not None:
        return []
    groups = [(describe_combination(group[0].values), scores(group)) for group in combinations(rows)]
    return [line for name, group_rows in groups if (line := remark_on(name or "all runs", group_rows))]


def _page(rows: Sequence[Row], name: str, lines: Sequence[str], *, has_picture: bool) -> str:
    metric = metric_label(headline_of(rows) or "metric")
    keys = list(rows[0].values)
    repeats = "seeds" if rows[0].job.data.folds is None else "folds and seeds"
    head = [*keys, repeats, f"{metric}, mean ± standard deviation", "epsilon spent"]
    cells = [
        [*(format_value(value) for value in line.values.values()), str(line.seeds), line.score, line.epsilon]
        for line in table(rows)
    ]
    parts = [f"# {name}: a sweep", *lines[:1], "![The frontier](frontier.png)" if has_picture else ""]
    parts += [markdown_table(head, cells), *lines[1:], _loss_table(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _loss_table(rows: Sequence[Row]) -> str:
    """What each private combination loses against the same without privacy, seed by seed."""
    all_losses = losses(rows)
    if not all_losses:
        return ""
    unit = "points" if scale_of(all_losses[0].metric) == 100 else metric_label(all_losses[0].metric)
    digits = 1 if unit == "points" else 3
    lines = []
    for loss in all_losses:
        half = finite(loss.points.half)
        spread = "" if half is None else f" ± {half:.{digits}f}"
        lines.append([describe_combination(loss.values), f"{loss.points.mean:.{digits}f}{spread}"])
    title = "Lost to privacy, with the 95 % interval of the mean over paired seeds:"
    return f"{title}\n\n{markdown_table(['run', unit], lines)}"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with a line for each of the `lines`, cell by cell."""
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)
