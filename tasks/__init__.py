"""What is learnt: data format, backbone and head, loss, metrics."""

from __future__ import annotations

import difflib

from protocol.errors import ConfigError
from tasks.classification import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION
from tasks.seam import Model, Shard, Task

__all__ = ["TASKS", "Model", "Shard", "Task", "task_named"]

TASKS: dict[str, Task] = {task.name: task for task in (TEXT_CLASSIFICATION, IMAGE_CLASSIFICATION)}


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
