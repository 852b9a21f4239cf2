"""The verb that writes a first job for data that it has looked at."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.display import escape, out
from atoll.cli.inspect import (
    ImageColumn,
    LabelColumn,
    OtherColumns,
    TaskOptions,
    TextColumn,
    section_given,
    show_findings,
    table_given,
)
from atoll.cli.run import Plugins
from atoll.cli.usage import Verb
from atoll.errors import ConfigError, DataError
from atoll.plugins import load_files

if TYPE_CHECKING:
    from atoll.data.classification import Findings
    from atoll.data.dataset import Dataset
    from atoll.job.job import DataSection

ROWS_A_CLIENT, MOST_CLIENTS = 20, 10
"""Where no column says whose a row is: so many rows a client at least, and so many clients at most."""
ROWS_A_VALUE = 10
"""So many rows each value of a column must have that says whose a row is: some are kept to test on."""
WHOSE = (
    "client",
    "site",
    "hospital",
    "user",
    "sender",
    "speaker",
    "author",
    "shop",
    "store",
    "patient",
    "series",
)
"""Names of columns that say whose a row is, the likeliest first."""


@dataclass(frozen=True)
class Beginning:
    """What a first job of a task is likely to do well with, on data of any size."""

    backbone: str
    weights: str = "pretrained"
    backbone_keys: Mapping[str, Any] = field(default_factory=dict)
    method: str = "full"
    tune_keys: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 20
    baselines: tuple[str, ...] = ("zero_shot", "local_only", "pooled")


MOBILENET = "torchvision:mobilenet_v2"
ADAM = {"epochs": 1, "batch_size": 16, "optimizer": "adamw", "lr": 0.003}
BEGINNINGS = {
    "text-classification": Beginning(
        "hf:all-MiniLM-L6-v2", method="head",
        train={"epochs": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.1},
    ),
    "image-classification": Beginning(
        MOBILENET, method="head", train={"epochs": 1, "batch_size": 16, "optimizer": "sgd", "lr": 0.05}
    ),
    "medical-imaging": Beginning(MOBILENET, method="head", train=ADAM | {"epochs": 2}),
    "image-text": Beginning(
        MOBILENET, method="head", train=ADAM, backbone_keys={"options": {"text": "hf:all-MiniLM-L6-v2"}}
    ),
    "forecasting": Beginning(
        "atoll:lstm", "random", {"options": {"width": 48}}, train=ADAM | {"batch_size": 32}
    ),
    "survival": Beginning("atoll:linear", "random", train=ADAM | {"epochs": 2, "batch_size": 32, "lr": 0.01}),
    "recommendation": Beginning(
        "atoll:sasrec", "random", {"options": {"width": 48}}, train=ADAM | {"batch_size": 32}
    ),
    "text-labels": Beginning("hf:all-MiniLM-L6-v2", method="head", train=ADAM),
    "text-regression": Beginning("hf:all-MiniLM-L6-v2", method="head", train=ADAM),
    "token-classification": Beginning("atoll:small-text", "random", train=ADAM | {"epochs": 2}),
    "text-to-text": Beginning("atoll:small-t5", "random", train=ADAM, baselines=("zero_shot",)),
    "question-answering": Beginning("atoll:small-t5", "random", train=ADAM, baselines=("zero_shot",)),
    "language-modeling": Beginning(
        "hf:SmolLM2-135M-Instruct", method="lora", tune_keys={"rank": 8, "layers": 4},
        train=ADAM | {"batch_size": 8, "lr": 0.002}, rounds=4, baselines=("zero_shot",),
    ),
    "preference": Beginning(
        "hf:SmolLM2-135M-Instruct", method="lora", tune_keys={"rank": 8, "layers": 4},
        train=ADAM | {"batch_size": 8, "lr": 0.0005}, rounds=4, baselines=(),
    ),
    "multiple-choice": Beginning(
        "hf:SmolLM2-135M-Instruct", method="lora", tune_keys={"rank": 8, "layers": 4},
        train=ADAM | {"batch_size": 8, "lr": 0.0005}, rounds=4, baselines=("zero_shot",),
    ),
    "speech-recognition": Beginning(
        "atoll:small-ctc", "random", train=ADAM | {"epochs": 3, "lr": 0.005}, baselines=("zero_shot",)
    ),
    "intent": Beginning("atoll:small-text", "random", train=ADAM | {"batch_size": 8}),
    "object-detection": Beginning(
        "atoll:detector", backbone_keys={"options": {"body": MOBILENET}},
        train=ADAM | {"batch_size": 4, "lr": 0.0005}, rounds=8, baselines=("zero_shot",),
    ),
    "segmentation": Beginning(
        "torchvision:lraspp_mobilenet_v3_large", "random", {"image_size": 128},
        train=ADAM | {"batch_size": 4, "lr": 0.002}, rounds=10, baselines=("zero_shot",),
    ),
}  # fmt: skip
"""By task: those that `jobs/` shows at work."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(cls=Verb, epilog="Example: atoll init text-classification my-reviews.csv")(init)


def init(
    task: Annotated[str, typer.Argument(metavar="TASK", help="See: atoll list tasks.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder or a file with examples.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The job file; else NAME.toml, as the data.")
    ] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, help="Simulated clients; else as many as suit the data.")
    ] = None,
    text: TextColumn = None,
    image: ImageColumn = None,
    label: LabelColumn = None,
    column: OtherColumns = None,
    option: TaskOptions = None,
    plugin: Plugins = None,
) -> None:
    """Look at data, and write a first job for it, with a comment to every choice."""
    load_files(plugin or ())
    from atoll.job.job import Job
    from atoll.server.job_checks import check_simulated
    from atoll.tasks import check_task

    check_task(task)
    if task not in BEGINNINGS:
        raise ConfigError(f"init: no first job is known for {task!r}, but for {', '.join(BEGINNINGS)}")
    name = re.sub(r"[^a-z0-9]+", "-", data.resolve().stem.lower()).strip("-") or "mine"
    where = out_file or Path(f"{name}.toml")
    if where.exists():
        raise ConfigError(f"{where}: is already there; choose another --out")
    if not where.parent.is_dir():
        raise ConfigError(f"{where}: there is no folder {where.parent}")
    columns = {"text": text, "image": image, "label": label}
    others = table_given(column, "--column")
    options = table_given(option, "--option")
    section = section_given(data, **columns, columns=others)
    findings, train, has_test = _look(task, section, options)
    show_findings(findings)
    named = {role: chosen for role, chosen in columns.items() if chosen}
    written = job_text(
        name, task, _source(data, where.parent), findings, train, has_test=has_test, clients=clients,
        columns=named | {f"columns.{role}": chosen for role, chosen in others.items()}, options=options,
    )  # fmt: skip
    where.write_text(written, "utf-8")
    try:
        check_simulated(Job.load(where))
    except ConfigError:
        where.unlink()
        raise
    out().print(f"job     {escape(str(where))}", highlight=False, soft_wrap=True)
    command = shlex.join(["atoll", "simulate", str(where)])
    out().print(f"run it  {escape(command)}", highlight=False, soft_wrap=True)


def _look(task: str, section: DataSection, options: dict[str, Any]) -> tuple[Findings, Dataset, bool]:
    """What is in the data, its rows to train on, and whether it has some to test on.

    Raises:
        DataError: some of it can't be used.
    """
    from atoll.tasks import task_named

    data = Path(section.source)
    findings = task_named(task).inspect(data, section, options)
    if findings.bad:
        looked = ["atoll", "check", str(data), "--task", task]
        raise DataError(
            findings.problems[0] if findings.bad == 1
            else f"{data}: {findings.bad} examples cannot be used; see: {shlex.join(looked)}"
        )  # fmt: skip
    table = task_named(task).read(data, section, options)
    return findings, table.train, table.test is not None


def job_text(
    name: str,
    task: str,
    source: str,
    findings: Findings,
    train: Dataset,
    *,
    has_test: bool,
    clients: int | None,
    columns: Mapping[str, Any],
    options: Mapping[str, Any],
) -> str:
    """The job as a commented TOML file; `source` is written as it is, `columns` by their keys in `[data]`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from atoll.tasks import TASKS

    begins, rows = BEGINNINGS[task], len(train)
    natural, others = whose(train)
    if clients is not None and natural and others.get(natural) != clients:
        natural = None  # the column has another number of values
    if natural:
        clients = others.pop(natural)
    classes = sorted(findings.train) if findings.class_counts == "class" and len(findings.train) > 1 else []
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["toml"] = in_toml
    return environment.get_template("job.toml.jinja").render(
        name=name, task=task, summary=TASKS[task].summary, source=source, options=dict(options),
        found="; ".join(one.description for one in findings.counts) or f"{rows} rows to train on",
        columns=dict(columns), classes=classes, natural=natural, others=others,
        skewed=bool(classes), has_test=has_test, rounds=begins.rounds, every=max(begins.rounds // 4, 1),
        clients=clients or max(min(MOST_CLIENTS, rows // ROWS_A_CLIENT), 2),
        backbone={"name": begins.backbone, "weights": begins.weights, "rest": dict(begins.backbone_keys)},
        tune={"method": begins.method, "rest": dict(begins.tune_keys)},
        train=dict(begins.train), baselines=list(begins.baselines),
    )  # fmt: skip


def whose(train: Dataset) -> tuple[str | None, dict[str, int]]:
    """(the column that says whose each row is, if one is called so; how many values each such column has).

    A column counts that has a value in every row, at least two different ones, and each in ten rows or more.
    """
    from atoll.data.labels import value_name

    counts: dict[str, int] = {}
    for column in train.column_names:
        if column in ("label", "event"):  # what is learnt
            continue
        cells = [value for value in train.cells(column) if isinstance(value, str | int | bool)]
        rows_of = Counter(map(value_name, cells))
        is_full = len(cells) == len(train) and None not in rows_of
        if is_full and len(rows_of) > 1 and min(rows_of.values()) >= ROWS_A_VALUE:
            counts[column] = len(rows_of)
    likely = [column for word in WHOSE for column in counts if word in column.lower()]
    return (likely[0] if likely else None), counts


def in_toml(value: Any) -> str:
    """A value as TOML writes it, on one line."""
    import tomli_w

    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {in_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(in_toml, value)) + "]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _source(data: Path, folder: Path) -> str:
    """The data as the job file names it: relative to itself where it is below, so that both can move."""
    data, folder = data.resolve(), folder.resolve()
    return f"./{data.relative_to(folder)}" if data.is_relative_to(folder) else str(data)
