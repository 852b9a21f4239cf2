"""Whether the facts of a client's greeting have the form that its task gives them.

A greeting comes from another machine, and what a model is built from decides how much memory is taken.
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
"""Of one class, item or text at most."""


def check_info(task: Task, job: Job, info: DataInfo) -> None:
    """See whether a greeting's facts are those that the task declares, each of its form and not too large.

    Names that the job gives must be the job's own. A task that declares nothing is only tried.

    Raises:
        DataError: they aren't; the line names the field.
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
        pass  # one client's data may be too little: all of it together is what counts
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
    """Names are the job's where it gives them, and nobody else's."""
    if not any(field is PINNED for field in fields):
        return
    if bool(info.get(PINNED.name)) != (job.data.classes is not None):
        raise DataError("the greeting's pinned: expected true where the job gives data.classes, else nothing")
    named = next(field.name for field in fields if field.job_key == "data.classes")
    if job.data.classes is not None and info.get(named) != pinned_names(job.data):
        raise DataError(f"the greeting's {named} are not the job's data.classes")
