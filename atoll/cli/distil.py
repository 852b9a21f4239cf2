"""The verb that teaches a smaller network what a trained model knows, on public data in one place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.display import out as shown
from atoll.cli.display import sanitize
from atoll.cli.run import Overrides, Plugins, next_free_path, run_here
from atoll.cli.usage import Verb
from atoll.errors import ConfigError
from atoll.plugins import load_files
from atoll.trained import trained

if TYPE_CHECKING:
    from atoll.job.job import Job
    from atoll.learning.learner import Learner

EXAMPLES_PER_BATCH = 64
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
TRAINING: dict[str, Any] = {
    "tune": {"method": "full"},
    "train": {"epochs": 2, "batch_size": 16, "optimizer": "adam", "lr": 3e-4},
}
"""How a student is trained that is named by its backbone alone."""
ROUNDS = 5


def register(app: typer.Typer) -> None:
    """Add the verb."""
    example = "Example: atoll distil runs/news --student hf:prajjwal1/bert-mini --data texts.txt"
    app.command(cls=Verb, epilog=example)(distil)


def distil(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The teacher: a run directory.")],
    student: Annotated[str, typer.Option(metavar="S", help="A job file, or the name of a backbone.")],
    data: Annotated[Path, typer.Option(metavar="DATA", help="Public examples, with labels or without.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the student goes.")] = None,
    temperature: Annotated[float, typer.Option(help="What softens the answers.")] = 2.0,
    weight: Annotated[float | None, typer.Option(help="The teacher's part; without labels all.")] = None,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an old run in --out.")] = False,
    plugin: Plugins = None,
) -> Path:
    """Train a smaller student on public data by a trained model's soft answers and the labels, if any."""
    load_files(plugin or ())
    learner, tensors = trained(run)
    default = Path("runs") / f"{run.resolve().name}-student"
    where = out or (default if force else next_free_path(default, resume=False))
    if not data.exists():
        raise ConfigError(f"--data: no such file or folder {data}")
    unlabelled = is_unlabelled(data)
    source = data
    if unlabelled:
        if weight not in (None, 1.0):
            raise ConfigError(f"--weight: without labels the teacher says all, expected 1, found {weight}")
        source = where.with_name(f"{where.name}-data")
        with shown().status("asking the teacher"):
            label(learner, tensors, data, source, force)
    part = 1.0 if unlabelled else 0.5 if weight is None else weight
    teaching = {"teacher": str(run.resolve()), "teacher_temperature": temperature, "teacher_weight": part}
    job = student_job(student, learner, source, teaching, overrides or [])
    made = run_here(job, where, default=where, force=force)
    if unlabelled:
        note = f"labels are the teacher's, in {source}: metrics tell how far the student agrees with it"
        shown().print(sanitize(note), highlight=False, soft_wrap=True)
    return made


def student_job(
    student: str, learner: Learner, source: Path, teaching: dict[str, Any], overrides: list[str]
) -> Job:
    """One client with all the public data, taught by the run; what the job file says of data is left out.

    Raises:
        ConfigError: the job, or a key of it, is wrong.
    """
    from atoll.job.job import Job
    from atoll.job.toml import YAML, apply_override, read_job

    teacher_table = learner.job.model_dump(mode="json")
    if student.lower().endswith((".toml", *YAML)):
        origin, folder, table = student, Path(student).parent, read_job(Path(student))
    else:
        origin, folder = "--student", Path()
        backbone = {"name": student, "max_tokens": teacher_table["backbone"]["max_tokens"]}
        table = {"name": "student", "seed": teacher_table["seed"], "backbone": backbone, **TRAINING}
    table["task"] = teacher_table["task"]
    table["data"] = {"source": str(source.resolve()), "classes": learner.data_info["classes"]}
    table["federation"] = {
        "clients": 1,
        "rounds": table.get("federation", {}).get("rounds", ROUNDS),
    }
    table["strategy"], table["privacy"], table["evaluate"] = {}, {}, {}
    table["train"] = {**table.get("train", {}), **teaching}
    for override in overrides:
        apply_override(table, override)
    return Job.parse(table, origin=origin, folder=folder)


def is_unlabelled(data: Path) -> bool:
    """Whether there is nothing but texts, one a line, or nothing but images in one folder."""
    if data.is_file():
        return data.suffix == ".txt"
    entries = list(data.iterdir())
    return bool(entries) and all(e.is_file() and e.suffix.lower() in IMAGE_SUFFIXES for e in entries)


def label(learner: Learner, tensors: Any, data: Path, folder: Path, force: bool) -> None:
    """Write the examples with the class that the teacher gives each: a table of texts, or class folders.

    Raises:
        ConfigError: there is such a folder. DataError: an example can't be read.
    """
    if folder.exists() and not force:
        raise ConfigError(f"{folder}: exists, choose another --out or --force")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lines = [line for line in data.read_text("utf-8").splitlines() if line.strip()] if data.is_file() else []
    lines = lines or sorted(str(file) for file in data.iterdir())
    for start in range(0, len(lines), EXAMPLES_PER_BATCH):
        part = lines[start : start + EXAMPLES_PER_BATCH]
        labels = learner.predictions(tensors, list(_raw(learner, part, data.is_file())))
        answers = [answer["label"] for answer in learner.task.format_predictions(labels, learner.data_info)]
        for one, name in zip(part, answers, strict=True):
            _put(one, name, folder, is_text=data.is_file())


def _raw(learner: Learner, lines: list[str], is_text: bool) -> Iterator[Any]:
    for one in lines:
        yield one if is_text else learner.task.parse_input(one)


def _put(one: str, name: str, folder: Path, *, is_text: bool) -> None:
    if is_text:
        with (folder / "data.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": one, "label": name}, ensure_ascii=False) + "\n")
        return
    (folder / name).mkdir(exist_ok=True)
    shutil.copy(one, folder / name / Path(one).name)
