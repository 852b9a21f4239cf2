"""What stands beside an exported network for whoever finds it: how it came about, and what was promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from atoll.export.huggingface import ADAPTER
from atoll.learning.learner import Learner
from atoll.report.run_result import RunResult
from atoll.report.text import what_was_private
from atoll.tasks.language_modeling.task import LanguageModeling
from atoll.tasks.metric_values import UNDEFINED, MetricValues

CARD = "README.md"


def write_card(learner: Learner, result: RunResult, metrics: MetricValues, folder: Path) -> None:
    """`README.md` with the fields that the Hugging Face hub reads, in the folder and in its adapter's.

    `result` is the run's, `metrics` those of the exported model.
    """
    text = described(learner, result, metrics)
    for place, library in ((folder, "transformers"), (folder / ADAPTER, "peft")):
        if place.is_dir():
            head = yaml.safe_dump(_fields(learner, library), sort_keys=False, allow_unicode=True)
            (place / CARD).write_text(f"---\n{head}---\n\n{text}", encoding="utf-8")


def base_of(learner: Learner) -> str:
    """The name of the network that the run began with; of a folder its last part, not where it lies."""
    name = learner.job.backbone.name.removeprefix("hf:")
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name


def _fields(learner: Learner, library: str) -> dict[str, Any]:
    is_language = isinstance(learner.task, LanguageModeling)
    kind = {"pipeline_tag": "text-generation"} if is_language else {}
    tags = ["federated-learning", learner.task.name, *(["lora"] if learner.job.tune.method == "lora" else [])]
    return {"base_model": base_of(learner), "library_name": library, **kind, "tags": tags}


def described(learner: Learner, result: RunResult, metrics: MetricValues) -> str:
    """The card below its fields."""
    job, rounds = learner.job, len(result.rounds)
    lines = [
        f"# {_bare(job.name)}",
        f"`{_bare(base_of(learner))}`, tuned ({job.tune.description}) for {learner.task.name} by federated"
        f" learning: {result.population:,} clients, {rounds:,} round{'s' * (rounds != 1)} of"
        f" {_bare(result.strategy)}. The clients' data stayed with them.",
        *_rows(learner),
        *_hashes(learner),
        what_was_private(result.privacy),
        "| metric | value |\n|---|---|\n" + "\n".join(_line(*item) for item in metrics.items()),
        "Measured on the examples that `export.json` counts.",
    ]
    return "\n\n".join(lines) + "\n"


def _rows(learner: Learner) -> list[str]:
    """What a client's rows hold, for tasks on texts to be read or written."""
    if not isinstance(learner.task, LanguageModeling):
        return []
    names = [f"`{role.name}`" for role in learner.task.records(learner.job.task.options).roles]
    return [f"Data: rows with {', '.join(names)}, or those of them that make up one of the task's formats."]


def _hashes(learner: Learner) -> list[str]:
    """What all clients had alike, by SHA-256: the tokenizer and the chat template, where there are any."""
    lines = [f"{name} `{value}`" for name, value in sorted(learner.task.required_info().items())]
    return [f"Alike at all clients (SHA-256): {', '.join(lines)}."] if lines else []


def _line(name: str, value: float | None) -> str:
    return f"| {name} | {UNDEFINED if value is None else f'{value:.4f}'} |"


def _bare(text: str) -> str:
    """A name without what Markdown would take for its own."""
    return "".join(letter for letter in text if letter.isalnum() or letter in " -_./:+()")
