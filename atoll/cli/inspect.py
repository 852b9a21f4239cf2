"""Verbs that look: report, check, track, list; and the one that takes a client out of a run: forget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.display import escape, out, sanitize
from atoll.cli.run import Plugins
from atoll.cli.usage import Verb
from atoll.errors import ConfigError, DataError, did_you_mean
from atoll.plugins import load_files
from atoll.trained import check_finished

if TYPE_CHECKING:
    from atoll.data.classification import Findings
    from atoll.job.job import DataSection
    from atoll.report.run_result import RunResult

ClusterNumber = Annotated[
    int | None, typer.Option("--cluster", metavar="N", help="Whose model, of a run that has clusters.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
TextColumn = Annotated[str | None, typer.Option(help="The text column, if it isn't found.")]
ImageColumn = Annotated[str | None, typer.Option(help="The image column, if it isn't found.")]
LabelColumn = Annotated[str | None, typer.Option(help="The label column, if it isn't found.")]
OtherColumns = Annotated[
    list[str] | None, typer.Option(metavar="ROLE=NAME", help="Another column, as in data.columns.")
]
TaskOptions = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="One of the task's options.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(cls=Verb, epilog="Example: atoll report runs/bbc-news")(report)
    app.command(cls=Verb, epilog="Example: atoll forget runs/flowers north")(forget)
    app.command(cls=Verb, epilog="Example: atoll check my-photos --task image-classification")(check)
    app.command(cls=Verb, epilog="Example: atoll track runs/bbc-news --to tensorboard")(track)
    app.command("list", cls=Verb, epilog="Example: atoll list backbones")(list_)


def forget(
    run: RunDir,
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="The client's name in the run.")],
) -> None:
    """Take one client's sums out of a closed-form model again, exactly."""
    check_finished(run, run / "result.json")
    from atoll.server.run.forget import forget as take_away

    record = take_away(run, client)
    if (run / "report.html").is_file():
        report(run)
    out().print(
        f"{sanitize(client)} is forgotten: model {record['model_sha256'][:12]} of"
        f" {record['clients_left']} clients replaces {record['replaced_sha256'][:12]}",
        highlight=False,
    )


def report(run: RunDir) -> None:
    """Write RUN/report.html anew from RUN/result.json."""
    result = read_result(run)
    from atoll.report.page import write_report

    write_report(run, result)
    out().print(f"report  {run / 'report.html'}", highlight=False, soft_wrap=True)


def track(
    run: RunDir,
    to: Annotated[list[str], typer.Option("--to", metavar="NAME", help="tensorboard, mlflow or wandb.")],
) -> None:
    """Write a complete run, simulated or of real sites, to TensorBoard or MLflow."""
    from atoll.tracking import track_finished

    for name, place in track_finished(run, read_result(run), to).items():
        out().print(f"{name:<13}  {sanitize(place)}", highlight=False, soft_wrap=True)


def read_result(run: Path) -> RunResult:
    """A complete run's result.

    Raises:
        ConfigError: RUN isn't one.
    """
    from atoll.report.run_result import RESULT_FILE, RunResult

    check_finished(run, run / RESULT_FILE)
    return RunResult.read(run)


def check(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A shard: a folder or a file.")],
    task: Annotated[str, typer.Option("--task", metavar="T", help="See: atoll list tasks.")],
    text: TextColumn = None,
    image: ImageColumn = None,
    label: LabelColumn = None,
    column: OtherColumns = None,
    time_format: Annotated[
        str | None, typer.Option(help="How times are written (strptime), as in data.time_format.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="As data.bits: how many bits grey values use.")] = None,
    window: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="As data.window: the grey values to be seen.")
    ] = None,
    option: TaskOptions = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also say what it reads of a language model's data.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Look at a site's data before it joins: what is there, and what is wrong with it."""
    load_files(plugin or ())
    from atoll.tasks import task_named

    section = section_given(
        data, text=text, image=image, label=label, columns=table_given(column, "--column"),
        time_format=time_format, bits=bits, window=_window(window),
    )  # fmt: skip
    findings = task_named(task).inspect(data, section, table_given(option, "--option"))
    if findings.bad == 1 and not (findings.train or findings.test):  # all of it is one fault
        raise DataError(findings.problems[0])
    show_findings(findings)
    if findings.bad:
        raise DataError(f"{data}: {findings.bad} examples cannot be used; mend or remove them")
    if backbone is not None:
        from atoll.backbones.resolve import resolve
        from atoll.job.job import BackboneSection

        resolved = resolve(BackboneSection(name=backbone), 0)
        for note in task_named(task).notes_on(data, section, table_given(option, "--option"), resolved):
            out().print(f"note        {escape(note)}", highlight=False, soft_wrap=True)
    out().print("[green]ready[/]: a run can use this data as it is")


def section_given(data: Path, **value: Any) -> DataSection:
    """`[data]` of a shard that options describe.

    Raises:
        ConfigError: a value isn't one that the key takes.
    """
    from atoll.job.extension_options import validated
    from atoll.job.job import DataSection

    section = validated(DataSection, {"source": str(data), **value}, "data")
    assert isinstance(section, DataSection)
    return section


def show_findings(findings: Findings) -> None:
    """What was found, in the words of a person who looks for faults."""
    from rich.table import Table

    table = Table(findings.class_counts, "train", "test")
    for name in sorted({*findings.train, *findings.test}):
        table.add_row(escape(name), str(findings.train.get(name, 0)), str(findings.test.get(name, 0)))
    table.add_row("all", str(sum(findings.train.values())), str(sum(findings.test.values())), style="bold")
    out().print(table)
    out().print(f"sizes       {findings.sizes}", highlight=False)
    out().print(f"duplicates  {findings.duplicates}", highlight=False)
    for counts in findings.counts:
        out().print(f"counts      {escape(counts.description)}", highlight=False, soft_wrap=True)
    for note in findings.notes:
        out().print(f"note        {escape(note)}", highlight=False, soft_wrap=True)
    for problem in findings.problems:
        out().print(f"[red]unreadable[/]  {escape(problem)}", highlight=False, soft_wrap=True)


def _window(written: str | None) -> tuple[float, ...] | None:
    if written is None:
        return None
    try:
        return tuple(map(float, written.split(",")))
    except ValueError:
        raise ConfigError(f"--window: expected LOW,HIGH, such as 0,4095, found {written!r}") from None


def table_given(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """What `key=value` pairs say, the values as in TOML."""
    from atoll.job.toml import apply_override

    table: dict[str, Any] = {}
    for pair in pairs or ():
        apply_override(table, pair, option=option)
    return table


def list_(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="tasks, backbones, strategies, partitions, sources or metrics"),
    ],
    plugin: Plugins = None,
) -> None:
    """What there is, one line each: its name, who brings it, what it is."""
    load_files(plugin or ())
    from atoll.cli.listing import CATALOGUE

    if what not in CATALOGUE:
        raise ConfigError(f"list {what}: {did_you_mean(what, CATALOGUE)}")
    lines = CATALOGUE[what]()
    width, origins = (max(len(line[place]) for line in lines) for place in (0, 2))
    for name, summary, origin in lines:
        typer.echo(f"{name:<{width}}  {origin:<{origins}}  {summary}")
