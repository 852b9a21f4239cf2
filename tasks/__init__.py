"""What is learnt: data format, backbone and head, loss, metrics."""

from __future__ import annotations

import difflib

from protocol.errors import ConfigError
from protocol.job import Job
from tasks.answering import QUESTION_ANSWERING
from tasks.classification import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION
from tasks.detection import DETECTION
from tasks.forecasting import FORECASTING
from tasks.image_text import IMAGE_TEXT
from tasks.intent import INTENT
from tasks.medical import MEDICAL_IMAGING
from tasks.recommendation import RECOMMENDATION
from tasks.seam import Model, Shard, Task
from tasks.segmentation import SEGMENTATION
from tasks.speech import SPEECH_RECOGNITION

__all__ = ["TASKS", "Model", "Shard", "Task", "task_named", "trains_on_features"]

REGISTERED: tuple[Task, ...] = (
    TEXT_CLASSIFICATION,
    IMAGE_CLASSIFICATION,
    IMAGE_TEXT,
    FORECASTING,
    RECOMMENDATION,
    QUESTION_ANSWERING,
    SPEECH_RECOGNITION,
    DETECTION,
    SEGMENTATION,
    MEDICAL_IMAGING,
    INTENT,
)
TASKS: dict[str, Task] = {task.name: task for task in REGISTERED}


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(TASKS)}"
        raise ConfigError(f"task.name: unknown task {name!r}, {hint}")
    return TASKS[name]


def trains_on_features(job: Job) -> bool:
    """Whether training sees nothing but kept features of a frozen backbone."""
    return task_named(job.task.name).on_features and job.leaves_backbone
