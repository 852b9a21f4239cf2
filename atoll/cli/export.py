"""The verb that ships a trained model: written for others, read back, measured before and after."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoll.cli.display import out as shown
from atoll.cli.inspect import ClusterNumber, read_result
from atoll.cli.run import Plugins
from atoll.cli.usage import Verb
from atoll.errors import ConfigError, JobError
from atoll.plugins import load_files
from atoll.trained import trained

if TYPE_CHECKING:
    from rich.table import Table

    from atoll.backbones.encoder import Batch, Model
    from atoll.data.shard import Shard
    from atoll.learning.learner import Learner
    from atoll.tasks.metric_values import MetricValues

FORMATS = ("safetensors", "huggingface", "gguf", "onnx", "onnx-int8", "torchao-int8")
WITH_A_CARD = ("huggingface", "gguf")
MAX_MEASURED_EXAMPLES = 1000
"""Measured at most, before and after."""
CALIBRATION_EXAMPLES = 128
TIMED = 30
"""Passes of one example, whose median is the latency."""
BATCH = 16
KINDS = ("magnitude", "structured")
MAX_PRUNED_PART = 0.95


@dataclass(frozen=True)
class Measured:
    """What a form of the model costs, and what it is worth."""

    megabytes: float
    milliseconds: float
    metrics: MetricValues


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(cls=Verb, epilog="Example: atoll export runs/bbc-news --format onnx-int8")(export)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    format: Annotated[str, typer.Option("--format", metavar="F", help=", ".join(FORMATS))],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: RUN/exports/F.")] = None,
    data: Annotated[Path | None, typer.Option(help="What to measure on, if not the job's test data.")] = None,
    max_drop: Annotated[float, typer.Option(min=0.0, help="How far the metric may fall.")] = 0.01,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    prune: Annotated[float | None, typer.Option(help="Leave out this part of every layer.")] = None,
    prune_kind: Annotated[str | None, typer.Option(help="magnitude (default) or structured.")] = None,
    cluster: ClusterNumber = None,
    plugin: Plugins = None,
) -> Path:
    """Write the trained model for other programs, and measure what that costs."""
    load_files(plugin or ())
    if format not in FORMATS:
        raise ConfigError(f"--format: expected one of {', '.join(FORMATS)}, found {format!r}")
    check_pruning(prune, prune_kind)
    folder = out or run / "exports" / format
    if folder.exists() and any(folder.iterdir()) and not force:
        raise ConfigError(f"{folder}: exists and is not empty, choose another --out or --force")
    learner, tensors = trained(run, cluster)
    check_can_be(learner, format)
    examples = examples_of(learner, data)
    model = learner.filled(tensors)
    with shown().status(f"measuring {len(examples)} examples as trained"):
        before = Measured(
            size_of(model), latency(model, learner, examples), learner.evaluate_model(model, examples)
        )
    staging = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if prune is not None:
            make_smaller(model, learner, examples, prune, prune_kind or KINDS[0])
        with shown().status(f"writing {format}"):
            result = written(model, learner, format, staging, examples)
        with shown().status(f"measuring {len(examples)} examples as {format}"):
            after = Measured(
                megabytes_in(staging, format),
                latency(result, learner, examples),
                learner.evaluate_model(result, examples),
            )
        check_drop(learner.task.primary_metric, format, before, after, max_drop)
        if format in WITH_A_CARD:
            from atoll.export.model_card import write_card

            write_card(learner, read_result(run), after.metrics, staging)
        (staging / "export.json").write_text(
            json.dumps(export_info(learner, run, format, before, after, len(examples)), indent=2) + "\n",
            "utf-8",
        )
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shown().print(table_of(format, before, after))
    shown().print(f"measured on  {len(examples)} examples; ms is the pass of one of them", highlight=False)
    shown().print(f"written to   {folder}", highlight=False, soft_wrap=True)
    return folder


def check_pruning(part: float | None, kind: str | None) -> None:
    """Raises ConfigError unless that can be asked for."""
    if part is not None and not 0 < part <= MAX_PRUNED_PART:
        raise ConfigError(f"--prune: expected a part above 0 and up to {MAX_PRUNED_PART}, found {part:g}")
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--prune-kind: expected {' or '.join(KINDS)}, found {kind!r}")
    if kind is not None and part is None:
        raise ConfigError("--prune-kind: has no meaning without --prune: leave it out")


def check_can_be(learner: Learner, format: str) -> None:
    """Raises ConfigError unless a run of this task and backbone can be had in that format."""
    if format == "huggingface" and learner.backbone.kind != "hf":
        raise ConfigError(
            f"--format huggingface: {learner.job.backbone.name} is no transformers network, try onnx"
        )
    if format == "gguf":
        from atoll.export.gguf import check_gguf

        check_gguf(learner)
    if format == "torchao-int8":
        from atoll.export import torchao

        torchao.check_installed()
    if format.startswith("onnx"):
        from atoll.export.onnx import MEANT_FOR, WHOLE_NETWORKS, check_installed

        check_installed()
        if not (learner.task.uses_pooled_features or learner.task.name in WHOLE_NETWORKS):
            raise ConfigError(f"--format {format}: for {MEANT_FOR}, not {learner.task.name}")


def examples_of(learner: Learner, data: Path | None) -> Shard:
    """What the export is measured on: the given data's test part or all of it, else the job's test data.

    Raises:
        ConfigError: there is none. DataError: the data is unfit.
    """
    from atoll.server.run.test_set import server_test_set

    job = learner.job
    if data is None:
        test_set = server_test_set(job)(learner)
        if test_set is None:
            raise ConfigError("--data: missing, and the run's job has no test data here to measure on")
        return test_set.select(range(min(len(test_set), MAX_MEASURED_EXAMPLES)))
    table = learner.task.read(data, job.data, job.task.options)
    shard = learner.task.shard(table.train if table.test is None else table.test, learner.data_info)
    return shard.select(range(min(len(shard), MAX_MEASURED_EXAMPLES)))


def make_smaller(model: Model, learner: Learner, examples: Shard, part: float, kind: str) -> None:
    """Prune the backbone in place; the learner's job says so from then on.

    Raises:
        ConfigError: its run has pruned it before, or there is nothing to leave out.
    """
    from atoll.export.safetensors import make_plain
    from atoll.learning.pruning import leave_out

    backbone = learner.job.backbone
    if backbone.prune is not None:
        raise ConfigError(f"--prune: the run was pruned by {backbone.prune:g} before it was trained")
    make_plain(model)
    rows = range(min(2, len(examples)))
    leave_out(model.backbone, part, kind, learner.collate(examples, rows), model.head, "--prune")  # type: ignore[arg-type]
    pruned = backbone.model_copy(update={"prune": part, "prune_kind": kind})
    learner.job = learner.job.model_copy(update={"backbone": pruned})


def written(model: Model, learner: Learner, format: str, folder: Path, examples: Shard) -> Model:
    """Write the model; what was written, read back and used as the model is."""
    from atoll.export.huggingface import read_network, write_folder, write_tokenizer
    from atoll.export.safetensors import make_plain, read_tensors, write_tensors

    if format == "huggingface":
        write_folder(model, learner.job, folder)
        read_network(model, folder)
        return model
    make_plain(model)
    if format == "safetensors":
        write_tensors(model, folder / "model.safetensors")
        read_tensors(model, folder / "model.safetensors")
        return model
    if format == "gguf":
        from atoll.export.gguf import read_gguf, write_gguf

        write_gguf(model, learner, folder)
        read_gguf(model, folder)
        return model
    if format == "torchao-int8":
        from atoll.export import torchao

        torchao.quantise(model)
        torchao.write_model(model, learner, folder)
        return torchao.read_model(folder)[1].to(learner.job.train.device)
    from atoll.export import onnx

    path = folder / "model.onnx"
    onnx.write_onnx(model, learner.collate(examples, range(1)), path)
    if format == "onnx-int8":
        batches = calibration(learner) if onnx.convolves(model) else None
        onnx.quantise(path, folder / "int8.onnx", batches)
        (folder / "int8.onnx").rename(path)
    write_tokenizer(model, folder)
    return onnx.model_of(path, model, learner.job.train.threads)


def calibration(learner: Learner) -> Iterator[Batch]:
    """Some training examples of a source that is here, as batches.

    Raises:
        ConfigError: the training data is at the clients only.
    """
    from atoll.server.run.test_set import can_be_read_here, hold_out, read_source

    job = learner.job
    if not can_be_read_here(job):
        raise ConfigError(
            "--format onnx-int8: ranges are found on training data, which is not here; try onnx"
        )
    train, _ = hold_out(read_source(job), job)
    shard = learner.task.shard(train, learner.data_info)
    rows = range(min(len(shard), CALIBRATION_EXAMPLES))
    return (learner.collate(shard, rows[start : start + BATCH]) for start in range(0, len(rows), BATCH))


def latency(model: Model, learner: Learner, examples: Shard) -> float:
    """Milliseconds of one example's pass on this machine: the median of some."""
    import statistics

    import torch

    torch.set_num_threads(learner.job.train.threads)
    batch = learner.collate(examples, range(1))
    spent = []
    with torch.inference_mode():
        for _ in range(TIMED):
            began = time.perf_counter()
            model(batch)
            spent.append(time.perf_counter() - began)
    return 1000 * statistics.median(spent)


def size_of(model: Model) -> float:
    """Megabytes of the model's tensors."""
    from atoll.export.safetensors import tensors_of

    return sum(t.numel() * t.element_size() for t in tensors_of(model).values()) / 1e6


def megabytes_in(folder: Path, format: str) -> float:
    """Megabytes of the files that hold numbers."""
    patterns = {"onnx": "*.onnx*", "onnx-int8": "*.onnx*", "gguf": "*.gguf"}
    pattern = patterns.get(format, "*.safetensors")
    return sum(file.stat().st_size for file in folder.glob(pattern)) / 1e6


def check_drop(metric: str, format: str, before: Measured, after: Measured, most: float) -> None:
    """Raises JobError if the metric fell by more than that."""
    from atoll.tasks.metric_values import lower_is_better

    was, now = before.metrics[metric], after.metrics[metric]
    if was is None or now is None:
        raise JobError(f"--format {format}: {metric} is undefined on these examples; nothing was written")
    drop = now - was if lower_is_better(metric) else was - now
    if not drop <= most:
        raise JobError(
            f"--format {format}: {metric} goes from {was:.4f} to {now:.4f}, more than --max-drop {most:g}"
            " allows; nothing was written"
        )


def export_info(
    learner: Learner, run: Path, format: str, before: Measured, after: Measured, examples: int
) -> dict[str, Any]:
    """What stands in export.json."""
    return {
        "format": format,
        "run": str(run),
        "task": learner.job.task.name,
        "backbone": learner.job.backbone.name,
        "pruned": {"part": learner.job.backbone.prune, "kind": learner.job.backbone.prune_kind},
        "facts": learner.data_info,
        "examples": examples,
        "before": vars(before),
        "after": vars(after),
    }


def table_of(format: str, before: Measured, after: Measured) -> Table:
    """Both forms, side by side."""
    from rich.table import Table

    from atoll.tasks.metric_values import UNDEFINED

    table = Table()
    for name in ("model", "MB", "ms", *before.metrics):
        table.add_column(name.replace("_", " "), justify="left" if name == "model" else "right")
    for name, one in (("as trained", before), (format, after)):
        values = [UNDEFINED if v is None else f"{v:.4f}" for v in map(one.metrics.get, before.metrics)]
        table.add_row(name, f"{one.megabytes:.2f}", f"{one.milliseconds:.2f}", *values)
    return table
