"""Checks that the data info in a client's greeting has the form that the task declares.

A greeting comes from another machine, and a model built from it could take any amount of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atoll.errors import DataError, InputError
from atoll.job.job import Job
from atoll.tasks.classes import pinned_names
from atoll.tasks.data_info import PINNED, InfoField, declared_fields

if TYPE_CHECKING:
    from atoll.protocol.messages import DataInfo
    from atoll.tasks.task import Task

NAME_CHARACTERS = 10_000
"""The most characters in the name of a class or item, or in a text."""


def check_info(task: Task, job: Job, info: DataInfo) -> None:
    """Check that a greeting's fields are those that the task declares, of the right type and size.

    Where the job states the names, the greeting must have exactly these. For a task without a declaration
    only `merge_info` is tried.

    Raises:
        DataError: a field is unknown or has a wrong value; the line names it.
    """
    fields = declared_fields(task, job)
    if fields is not None:
        known = {field.name: field for field in fields}
        for name, value in info.items():
            if name not in known:
                raise DataError(
                    f"the greeting tells {name[:100]!r}, expected {', '.join(known) or 'nothing'}"
                )
            _check_field(known[name], value)
        _check_pinned(job, info, fields)
    try:
        task.merge_info([info])
    except InputError:
        pass  # one client's data alone may be too little, such as a single class
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"the greeting's facts have a wrong form ({type(error).__name__})") from None


def _check_field(field: InfoField, value: Any) -> None:
    match field.holds:
        case "flag":
            fits, expected = isinstance(value, bool), "true or false"
        case "number":
            fits = type(value) is int and -1 <= value <= field.at_most
            expected = f"a whole number up to {field.at_most}"
        case "names" | "texts":
            fits = _are_texts(value, field.at_most)
            fits = fits and (field.holds == "texts" or len(set(value)) == len(value))
            expected = f"a list of at most {field.at_most} {field.holds}"
        case "anything":
            return
    if not fits:
        count = f"{len(value)} of them" if isinstance(value, list) else type(value).__name__
        raise DataError(f"the greeting's {field.name}: expected {expected}, found {count}")


def _are_texts(value: Any, at_most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= at_most
        and all(isinstance(text, str) and len(text) <= NAME_CHARACTERS for text in value)
    )


def _check_pinned(job: Job, info: DataInfo, fields: Sequence[InfoField]) -> None:
    """Check that the greeting has the job's `data.classes` where the job states them, and is then pinned."""
    if not any(field is PINNED for field in fields):
        return
    if bool(info.get(PINNED.name)) != (job.data.classes is not None):
        raise DataError("the greeting's pinned: expected true where the job gives data.classes, else nothing")
    named = next(field.name for field in fields if field.job_key == "data.classes")
    if job.data.classes is not None and info.get(named) != pinned_names(job.data):
        raise DataError(f"the greeting's {named} are not the job's data.classes")
