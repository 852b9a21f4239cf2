"""What is learnt: data format, backbone and head, loss, metrics.

The registry is read without the tasks, which bring torch and more with them: one comes in when it is used.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from atoll.errors import ConfigError
from atoll.job.job import Job

if TYPE_CHECKING:
    from atoll.tasks.task import Task

__all__ = ["TASKS", "Entry", "check_task", "task_named", "trains_on_features"]


@dataclass(frozen=True)
class Entry:
    """One line of the registry: where a task is written, and what it says of itself."""

    module: str
    attribute: str
    summary: str
    headline: str = "accuracy"


TASKS: dict[str, Entry] = {
    "text-classification": Entry(
        "atoll.tasks.classification",
        "TEXT_CLASSIFICATION",
        "one label for a text; any transformers encoder; accuracy, macro F1",
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
    "recommendation": Entry(
        "atoll.tasks.recommendation.task",
        "RECOMMENDATION",
        "what a user takes next; SASRec, with items' texts where there are; HR@10, NDCG@10",
        "ndcg",
    ),
    "question-answering": Entry(
        "atoll.tasks.question_answering.task",
        "QUESTION_ANSWERING",
        "an answer in words, from a context or without; T5, BART, …; exact match, token F1",
        "exact_match",
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
    "intent": Entry(
        "atoll.tasks.intent.task",
        "INTENT",
        "what is asked for, of words with slots or of recordings; intent accuracy, slot F1",
        "intent_accuracy",
    ),
}


def check_task(name: str) -> None:
    """Raises ConfigError if there is no task of that name; none is imported for it."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(TASKS)}"
        raise ConfigError(f"task.name: unknown task {name!r}, {hint}")


def task_named(name: str) -> Task:
    """The task of that name, imported at first use.

    Raises:
        ConfigError: there is none.
    """
    check_task(name)
    entry = TASKS[name]
    task: Task = getattr(import_module(entry.module), entry.attribute)
    return task


def trains_on_features(job: Job) -> bool:
    """Whether training sees nothing but kept features of a frozen backbone."""
    return task_named(job.task.name).on_features and job.leaves_backbone
