"""What it costs and gains to make a trained model small: quantised, pruned, pruned and healed, distilled.

    python -m benchmarks.craft_small [CASE …]        # heads, demo, int8, digits

Every row is of five seeds, as a mean with its 95 % t-interval. `heads` teaches a student of a quarter of the
size; `demo` is jobs/bbc-news.toml with MiniLM, whose trained model is only shipped, on 30 texts a seed, and
`int8` the same on all test texts; `digits` trains a small
vision transformer from nothing over 8 clients, to prune it before the federation. Times of
all forms are taken in turns within one process, and told as shares of the plain model's time.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from atoll.backbones.encoder import Batch, Model
from atoll.cli import export
from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.trained import trained
from benchmarks.metrics import defined

SEEDS = (1, 2, 3, 4, 5)
TURNS = 40
JOBS = Path(__file__).parents[1] / "jobs"
HEAD = "| model | MB | time, of plain | accuracy | change |"


@dataclass
class Row:
    """One form of the model over the seeds."""

    megabytes: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


@dataclass
class Form:
    """A form of one seed's model, in use."""

    megabytes: float
    accuracy: float
    model: Model
    batch: Batch


def shipped(run: Path, format: str, count: int, prune: float | None = None, kind: str = "") -> Form:
    """The run's model as `atoll export` writes it, measured on so many test examples."""
    learner, tensors = trained(run)
    examples = export.examples_of(learner, None)
    examples = examples.select(range(min(count, len(examples))))
    model = learner.filled(tensors)
    if prune is not None:
        export.make_smaller(model, learner, examples, prune, kind)
    if format == "plain":
        size = export.size_of(model)
    else:
        folder = Path(tempfile.mkdtemp(dir=run.parent))
        model = export.written(model, learner, format, folder, examples)
        size = export.megabytes_in(folder, format)
    measured = learner.evaluate_model(model, examples)
    return Form(size, defined(measured["accuracy"]), model, learner.collate(examples, range(1)))


def shares(forms: dict[str, Form]) -> dict[str, float]:
    """Each form's median time of one example, in turns, as a share of the first one's."""
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        for turn in range(TURNS + 5):
            for name, form in forms.items():
                began = time.perf_counter()
                form.model(form.batch)
                if turn >= 5:
                    spent[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(all_) for name, all_ in spent.items()}
    first = next(iter(medians.values()))
    return {name: median / first for name, median in medians.items()}


def forms_of(run: Path, count: int) -> dict[str, Form]:
    """The plain model of a run, and every form that it can be shipped in."""
    found = {"plain": shipped(run, "plain", count)}
    for format in ("onnx", "onnx-int8", "torchao-int8"):
        found[format] = shipped(run, format, count)
    for part in (0.3, 0.5):
        for kind in ("magnitude", "structured"):
            found[f"pruned {part:.0%}, {kind}"] = shipped(run, "plain", count, part, kind)
    found["pruned 30%, structured, onnx-int8"] = shipped(run, "onnx-int8", count, 0.3, "structured")
    return found


def demo(seed: int, folder: Path) -> dict[str, Form]:
    """The demo's job; 30 of its test texts for each seed."""
    job = Job.load(JOBS / "bbc-news.toml", [f"seed={seed}", "evaluate.baselines=[]", "evaluate.every=100"])
    return forms_of(ran(job, folder / "plain"), 30)


def int8(seed: int, folder: Path) -> dict[str, Form]:
    """The demo's job in 8 bits, on all of its test texts."""
    job = Job.load(JOBS / "bbc-news.toml", [f"seed={seed}", "evaluate.baselines=[]", "evaluate.every=100"])
    run = ran(job, folder / "plain")
    return {format: shipped(run, format, 10_000) for format in ("plain", "onnx-int8", "torchao-int8")}


def vision_transformer(folder: Path, width: int) -> str:
    """A folder of transformers' with a configuration alone: its weights are drawn by the job."""
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": width, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 4 * width, "image_size": 16, "patch_size": 4,
        "num_channels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shape = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(shape | scale))
    return str(folder)


def digits_job(seed: int, folder: str, weights: str = "random", **more: dict[str, Any]) -> Job:
    table: dict[str, Any] = {
        "name": "digits", "seed": seed, "task": {"name": "image-classification"},
        "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 1.0}},
        "backbone": {"name": folder, "weights": weights},
        "tune": {"method": "full"}, "train": {"epochs": 1, "batch_size": 16, "optimizer": "adam", "lr": 2e-3},
        "federation": {"clients": 8, "rounds": 40}, "evaluate": {"every": 100},
    }  # fmt: skip
    return Job.parse({key: {**table[key], **more[key]} if key in more else table[key] for key in table},
                     origin="benchmark")  # fmt: skip


def digits(seed: int, folder: Path) -> dict[str, Form]:
    """A vision transformer from nothing; pruned ones go on from it for as many rounds, as plain does too."""
    whole, quarter = vision_transformer(folder / "vit", 64), vision_transformer(folder / "small", 32)
    run = ran(digits_job(seed, whole), folder / "plain")
    found = forms_of(run, 1000)
    going_on: dict[str, Any] = {"train": {"lr": 5e-4}, "federation": {"rounds": 2}}
    again = ran(digits_job(seed, whole, str(run), **going_on), folder / "again")
    found["2 rounds more, unpruned"] = shipped(again, "plain", 1000)
    for kind in ("magnitude", "structured"):
        pruned: dict[str, Any] = {"backbone": {"prune": 0.5, "prune_kind": kind}}
        healed = ran(digits_job(seed, whole, str(run), **going_on, **pruned), folder / kind)
        found[f"pruned 50%, {kind}, 2 rounds more"] = shipped(healed, "plain", 1000)
    alone = ran(digits_job(seed, quarter), folder / "alone")
    found["student of a quarter, alone"] = shipped(alone, "plain", 1000)
    teaching: dict[str, Any] = {
        "train": {"teacher": str(run), "teacher_weight": 0.9, "teacher_temperature": 3.0}
    }
    taught = ran(digits_job(seed, quarter, **teaching), folder / "taught")
    found["student of a quarter, taught"] = shipped(taught, "plain", 1000)
    return found


def heads_job(seed: int, hidden: int, rounds: int, **train: Any) -> Job:
    table: dict[str, Any] = {
        "name": "heads", "seed": seed, "task": {"name": "image-classification"},
        "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.3}},
        "backbone": {"name": "raw:pixels", "image_size": 8}, "tune": {"hidden": hidden},
        "train": {"epochs": 2, "batch_size": 16, "lr": 0.5} | train,
        "federation": {"clients": 10, "rounds": rounds}, "evaluate": {"every": 100},
    }  # fmt: skip
    return Job.parse(table, origin="benchmark")


def heads(seed: int, folder: Path) -> dict[str, Form]:
    """A hidden layer of 64 units on pixels teaches one of 16, on the clients' own uneven data."""
    run = ran(heads_job(seed, 64, 60), folder / "teacher")
    found = {"teacher, 64 units": shipped(run, "plain", 1000)}
    for rounds in (10, 60):
        alone = ran(heads_job(seed, 16, rounds), folder / f"alone-{rounds}")
        found[f"student, 16 units, {rounds} rounds alone"] = shipped(alone, "plain", 1000)
        for weight in (0.5, 0.9):
            how = {"teacher": str(run), "teacher_weight": weight, "teacher_temperature": 3.0}
            taught = ran(heads_job(seed, 16, rounds, **how), folder / f"taught-{rounds}-{weight}")
            name = f"student, 16 units, {rounds} rounds, taught by {weight}"
            found[name] = shipped(taught, "plain", 1000)
    return found


def ran(job: Job, out: Path) -> Path:
    """The run directory of a job."""
    simulate(job, out, on_event=ignore_events, report=False)
    return out


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of the 95 % t-interval)."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread


def main(names: list[str]) -> None:
    """Run the cases and print a table in Markdown for each."""
    for name in names or list(CASES):
        rows: dict[str, Row] = {}
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                forms = CASES[name](seed, Path(folder))
                times = shares(forms)
                for form_name, form in forms.items():
                    row = rows.setdefault(form_name, Row())
                    row.megabytes.append(form.megabytes)
                    row.share.append(times[form_name])
                    row.accuracy.append(form.accuracy)
            print(f"{name}: seed {seed} of {len(SEEDS)}", file=sys.stderr, flush=True)
        print(f"\n{name}\n\n{HEAD}\n|---|---|---|---|---|")
        plain = next(iter(rows.values())).accuracy
        for form_name, row in rows.items():
            print(line(form_name, row, plain), flush=True)


def line(name: str, row: Row, plain: list[float]) -> str:
    """One row of the table."""
    share, around = interval(row.share)
    accuracy, within = interval(row.accuracy)
    changed, about = interval([a - b for a, b in zip(row.accuracy, plain, strict=True)])
    size = statistics.mean(row.megabytes)
    return (
        f"| {name} | {size:.2f} | {share:.2f} ± {around:.2f} | {accuracy:.3f} ± {within:.3f} |"
        f" {changed:+.3f} ± {about:.3f} |"
    )


CASES: dict[str, Callable[[int, Path], dict[str, Form]]] = {
    "heads": heads, "demo": demo, "int8": int8, "digits": digits,
}  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
