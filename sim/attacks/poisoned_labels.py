"""Hostile clients that learn from labels of their own making: the labels change, the examples don't."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.errors import ConfigError
from atoll.job.attack import AttackSection
from atoll.job.job import Job
from atoll.tasks import task_named
from atoll.tasks.classes import Labelled, pinned_names


def check_labels(job: Job) -> None:
    """Raises ConfigError unless the job's task has one class an example."""
    if not isinstance(task_named(job.task.name), Labelled):
        raise ConfigError(
            f"attack.kind: {job.attack.kind!r} changes classes, and {job.task.name} has none; expected a"
            " classification task, or another kind"
        )


def poisoned(train: Dataset, rows: NDArray[np.int64], job: Job) -> Dataset:
    """The training examples with other labels in those rows, which are the hostile clients'.

    Raises:
        ConfigError: the job's task has no classes, or there is no such class.
    """
    check_labels(job)
    labels: list[str] = train["label"]
    classes = pinned_names(job.data) or sorted(set(labels))
    change = _changes(job.attack, classes)
    chosen = np.arange(train.table.num_rows) if train.chosen is None else train.chosen
    column = train.table.column("label").to_pylist()
    for row in rows.tolist():
        column[chosen[row]] = change[labels[row]]
    place = train.table.schema.get_field_index("label")
    field = train.table.schema.field(place)
    return Dataset(
        train.table.set_column(place, field, pa.chunked_array([pa.array(column, type=field.type)])),
        train.chosen,
    )


def _changes(attack: AttackSection, classes: list[str]) -> dict[str, str]:
    """What each class becomes: the last for the first, the first for the last; or a backdoor's alone."""
    if attack.kind == "label-flip":
        return dict(zip(classes, reversed(classes), strict=True))
    for key in ("victim", "target"):
        if getattr(attack, key) not in classes:
            raise ConfigError(f"attack.{key}: expected one of {classes}, found {getattr(attack, key)!r}")
    changed = {name: name for name in classes}
    return changed | {str(attack.victim): str(attack.target)}
