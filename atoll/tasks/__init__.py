"""The registry of tasks; each defines its data format, its model, its loss and its metrics.

The registry can be read without importing the tasks, which import torch; a task is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigError
from atoll.job.extension_options import checked_options
from atoll.job.job import Job
from atoll.plugins import BUILT_IN, Extension, Registry, brought
from atoll.tasks.data_info import InfoField
from atoll.tasks.metric_values import direction_fault

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

    from atoll.tasks.module_task import IMAGE, NAME, NUMBER, NUMBERS, SOUND, TEXT, Column, ModuleTask
    from atoll.tasks.task import Task

__all__ = [
    "IMAGE", "METRICS", "NAME", "NUMBER", "NUMBERS", "SOUND", "TASKS", "TEXT", "Column", "Entry", "InfoField",
    "ModuleTask", "Task", "check_ghost_norms", "check_metric_options", "check_metrics", "check_task",
    "headline_of", "task_named", "trains_on_features", "with_brought_metrics",
]  # fmt: skip

_OF_MODULES = ("IMAGE", "NAME", "NUMBER", "NUMBERS", "SOUND", "TEXT", "Column", "ModuleTask")


def __getattr__(name: str) -> Any:
    """The base classes and column types for writing tasks, which import torch, at their first use."""
    if name == "Task":
        return import_module("atoll.tasks.task").Task
    if name not in _OF_MODULES:
        raise AttributeError(f"module 'atoll.tasks' has no attribute {name!r}")
    return getattr(import_module("atoll.tasks.module_task"), name)


@dataclass(frozen=True)
class Entry:
    """One line of the registry: a task's module and attribute, its summary, and the package it comes from."""

    module: str
    attribute: str
    summary: str
    primary_metric: str | None = "accuracy"
    """None for an extension's task, whose metric is known only once it is imported."""
    origin: str = BUILT_IN


def _of(extension: Extension) -> Entry:
    module, _, attribute = extension.place.partition(":")
    return Entry(module, attribute, extension.summary, None, extension.origin)


BUILT_INS: dict[str, Entry] = {
    "text-classification": Entry(
        "atoll.tasks.classification",
        "TEXT_CLASSIFICATION",
        "one label for a text; any transformers encoder; accuracy, macro F1",
    ),
    "text-labels": Entry(
        "atoll.tasks.text_scores.labels",
        "TEXT_LABELS",
        "several labels at once for a text; any transformers encoder; macro F1, exact sets, mAP",
        "macro_f1",
    ),
    "text-regression": Entry(
        "atoll.tasks.text_scores.numbers",
        "TEXT_REGRESSION",
        "a number for a text; any transformers encoder; MAE, Pearson and Spearman correlation",
        "mae",
    ),
    "image-classification": Entry(
        "atoll.tasks.classification",
        "IMAGE_CLASSIFICATION",
        "one label for an image; any torchvision or transformers vision model; accuracy, macro F1",
    ),
    "image-text": Entry(
        "atoll.tasks.image_text",
        "IMAGE_TEXT",
        "one label for an image with its text; two encoders, or CLIP; accuracy, macro F1",
    ),
    "forecasting": Entry(
        "atoll.tasks.forecasting.task",
        "FORECASTING",
        "the next steps of a series; LSTM, GRU, PatchTST; MAE, RMSE, MASE, pinball loss, direction",
        "mase",
    ),
    "survival": Entry(
        "atoll.tasks.survival.task",
        "SURVIVAL",
        "how soon an event comes, with censoring; linear Cox model, MLP; concordance index",
        "c_index",
    ),
    "recommendation": Entry(
        "atoll.tasks.recommendation.task",
        "RECOMMENDATION",
        "what a user takes next; SASRec, with items' texts where there are; HR@10, NDCG@10",
        "ndcg",
    ),
    "question-answering": Entry(
        "atoll.tasks.text_to_text.questions",
        "QUESTION_ANSWERING",
        "an answer in words, from a context or without; T5, BART, …; exact match, token F1",
        "exact_match",
    ),
    "text-to-text": Entry(
        "atoll.tasks.text_to_text.task",
        "TEXT_TO_TEXT",
        "a text from a text: translation, summary; T5, BART, …; chrF, BLEU, ROUGE-L, exact match",
        "chrf",
    ),
    "language-modeling": Entry(
        "atoll.tasks.language_modeling.task",
        "LANGUAGE_MODELING",
        "the next token of texts, answers, chats; Llama, GPT-2, Qwen, …; perplexity by token and byte",
        "byte_perplexity",
    ),
    "preference": Entry(
        "atoll.tasks.preference.task",
        "PREFERENCE",
        "the better of two completions, by DPO; Llama, GPT-2, Qwen, …; accuracy, reward margin",
    ),
    "multiple-choice": Entry(
        "atoll.tasks.multiple_choice.task",
        "MULTIPLE_CHOICE",
        "one of several choices; Llama, GPT-2, Qwen, …; accuracy by likelihood and in words, unparsable rate",
    ),
    "speech-recognition": Entry(
        "atoll.tasks.speech.task",
        "SPEECH_RECOGNITION",
        "what was said; wav2vec2, HuBERT, Whisper's encoder, or a small one, with CTC; WER, CER",
        "wer",
    ),
    "object-detection": Entry(
        "atoll.tasks.detection.task",
        "DETECTION",
        "boxes with classes; torchvision's Faster R-CNN, SSDlite; COCO's mAP, mAP50",
        "map",
    ),
    "segmentation": Entry(
        "atoll.tasks.segmentation.task",
        "SEGMENTATION",
        "a class for every pixel; torchvision's DeepLabV3, LRASPP, FCN, SegFormer; mean IoU",
        "mean_iou",
    ),
    "medical-imaging": Entry(
        "atoll.tasks.medical.task",
        "MEDICAL_IMAGING",
        "a finding from a scan (PNG, JPEG, DICOM), split by patient; AUROC, sensitivity, calibration",
        "auroc",
    ),
    "token-classification": Entry(
        "atoll.tasks.token_classification.task",
        "TOKEN_CLASSIFICATION",
        "a tag for each word: names, places; any transformers encoder; entity F1 (seqeval's)",
        "entity_f1",
    ),
    "intent": Entry(
        "atoll.tasks.intent.task",
        "INTENT",
        "what is asked for, of words with slots or of recordings; intent accuracy, slot F1",
        "intent_accuracy",
    ),
}

TASKS = Registry("task", BUILT_INS, _of)


def _as_it_is(extension: Extension) -> Extension:
    return extension


METRICS: Registry[Extension] = Registry("metric", {}, _as_it_is)
"""The metrics of extensions; every task also has metrics of its own."""


def check_task(name: str) -> None:
    """Raises ConfigError if there is no task of this name; imports no task."""
    TASKS.check(name, "task.name")


def check_metrics(job: Job) -> None:
    """Raises ConfigError if `evaluate.metrics` names an unknown metric; imports no metric."""
    for name in job.evaluate.metrics:
        if name not in METRICS and not len(METRICS):
            raise ConfigError(
                f"evaluate.metrics.{name}: unknown metric, and no extension brings one; a task's own metrics"
                " are always measured"
            )
        METRICS.check(name, "evaluate.metrics")


def check_metric_options(job: Job) -> None:
    """Raises ConfigError if a metric in `evaluate.metrics` is unknown or its options are invalid."""
    check_metrics(job)
    for name, options in job.evaluate.metrics.items():
        checked_options(METRICS[name].loaded(), options, f"evaluate.metrics.{name}")


def with_brought_metrics(
    metrics: MetricCollection, job: Job, data_info: Mapping[str, Any]
) -> MetricCollection:
    """A task's own metrics, followed by those that `evaluate.metrics` names.

    Raises:
        ConfigError: a metric is unknown, its options are invalid, its states can't be summed over clients, or
            its name says the opposite of its `higher_is_better`.
    """
    check_metrics(job)
    for name, options in job.evaluate.metrics.items():
        if name in metrics:
            raise ConfigError(f"evaluate.metrics.{name}: {job.task.name} measures it itself, expected none")
        metrics.add_metrics({name: _brought_metric(METRICS[name].loaded(), options, data_info)})
    for name, metric in metrics.items(keep_base=True, copy_state=False):
        if fault := direction_fault(name, metric.higher_is_better):
            raise ConfigError(f"metric {name}: {fault}")
    return metrics


def _brought_metric(extension: Extension, options: Mapping[str, Any], data_info: Mapping[str, Any]) -> Metric:
    where = f"evaluate.metrics.{extension.name}"
    assert extension.thing is not None
    made: Metric = extension.thing(dict(data_info), *checked_options(extension, options, where))
    for state, reduce in made._reductions.items():
        if getattr(reduce, "__name__", "") != "dim_zero_sum" or isinstance(made._defaults[state], list):
            raise ConfigError(
                f"{where}: state {state!r} ({extension.origin}) can't be added up over clients,"
                ' expected a tensor with dist_reduce_fx="sum"'
            )
    return made


def task_named(name: str) -> Task:
    """The task of this name, imported at its first use.

    Raises:
        ConfigError: there is no task of this name.
    """
    check_task(name)
    if not TASKS.has(name):
        return _brought_task(brought("task", name).loaded())
    entry = TASKS[name]
    task: Task = getattr(import_module(entry.module), entry.attribute)
    return task


@cache
def _brought_task(extension: Extension) -> Task:
    assert extension.thing is not None
    task: Task = extension.thing()
    task.name, task.summary = extension.name, extension.summary
    return task


def headline_of(name: str) -> str:
    """The name of a task's primary metric; "accuracy" if the task is unknown."""
    entry = TASKS.get(name)
    if entry is None:
        return "accuracy"
    return task_named(name).primary_metric if entry.primary_metric is None else entry.primary_metric


def trains_on_features(job: Job) -> bool:
    """Whether the job trains a head on cached features of a frozen backbone, and nothing else."""
    return task_named(job.task.name).uses_pooled_features and job.backbone_is_frozen


def check_ghost_norms(job: Job) -> None:
    """Raises ConfigError if `privacy.ghost_norms` is set and heads on features are all that is trained."""
    if job.privacy.ghost_norms and all(trains_on_features(stage) for stage in job.stages):
        raise ConfigError(
            f"privacy.ghost_norms has no meaning with tune.method = {job.tune.method!r} on features, where"
            " examples are clipped in closed form: remove it, or tune more than the head"
        )
