"""The fields in which a client's greeting describes its data, and which of them the job must state instead.

Where the job promises privacy or uses a secure sum, and at a site with a privacy budget, a greeting reveals
nothing about the data. Server, simulation and site call the same functions here, so all three refuse the
same jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from atoll.datasets.registry import SOURCES
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import uses_secure_aggregation

if TYPE_CHECKING:
    from atoll.data.dataset import Dataset
    from atoll.protocol.messages import DataInfo
    from atoll.tasks.task import Task

Concerns = Literal["public", "client", "example"]
Holds = Literal["names", "texts", "number", "flag", "anything"]
MOST_CLASSES = 10_000
"""How many classes clients may report; where there are more, the job must name them."""


@dataclass(frozen=True)
class InfoField:
    """One field of what a task's `local_info` returns: whose data it depends on, and which values are valid.

    `concerns` says what the field depends on: "public" (only the job and the installed code), "client" (a
    client's data as a whole) or "example" (possibly a single example). `job_key` is the job's key that states
    the field, so that no client is asked, and `what` describes that key's value for error messages. `holds`
    is the type: distinct names, texts, a whole number from -1 on, a flag, or anything. `at_most` bounds the
    number of names or texts, or the number itself. The server refuses greetings of any other form.
    """

    name: str
    concerns: Concerns
    job_key: str = ""
    what: str = ""
    holds: Holds = "anything"
    at_most: int = MOST_CLASSES


PINNED = InfoField("pinned", "public", holds="flag")
"""Whether the job itself names the classes."""


def is_silent(job: Job, *, has_budget: bool = False) -> bool:
    """Whether greetings reveal nothing about the data, not even the number of examples."""
    return bool(job.privacy.units) or uses_secure_aggregation(job) or has_budget


def declared_fields(task: Task, job: Job) -> Sequence[InfoField] | None:
    """The fields that the task declares for its `local_info`; None where the declaration is missing.

    A class that overrides `local_info` but not `info_fields` has none, whatever its base classes declare.
    """
    lines = [vars(kind) for kind in type(task).__mro__]
    speaks = next((place for place, line in enumerate(lines) if "local_info" in line), len(lines))
    declares = next(
        (place for place, line in enumerate(lines) if "info_fields" in line or "info_fields_for" in line),
        len(lines),
    )
    return None if declares > speaks or declares == len(lines) else task.info_fields_for(job)


def check_info_stated(job: Job, task: Task, *, at_a_site: bool = False, has_budget: bool = False) -> None:
    """Check that the job states every field that greetings must not take from the data.

    Nothing is required where greetings may describe the data, or where the data is a built-in source, which
    is public; at a real site the data is never a built-in source's.

    Raises:
        ConfigError: a greeting would reveal something about the data; the line names the key to set.
    """
    if not is_silent(job, has_budget=has_budget) or _is_public(job, at_a_site=at_a_site):
        return
    fields, why = declared_fields(task, job), _reason(job)
    if fields is None:
        raise ConfigError(
            f"task.name: {task.name} does not declare what its greetings tell of the data (`info_fields`),"
            f" expected another task with {why}"
        )
    for field in fields:
        if field.concerns == "public" or (field.job_key and _is_given(job, field.job_key)):
            continue
        if not field.job_key:
            raise ConfigError(
                f"task.name: with {task.name} clients tell {field.name!r} of their data, and no key of the"
                f" job can give it instead; expected another task with {why}"
            )
        raise ConfigError(
            f"{field.job_key}: missing, expected {field.what or field.name} with {why}:"
            " one made from the data would tell what clients hold"
        )


def greeting_info(
    job: Job, task: Task, dataset: Dataset, *, at_a_site: bool = False, has_budget: bool = False
) -> DataInfo:
    """A client's `local_info`; where greetings are silent, it is computed from no rows.

    Raises:
        ConfigError: as `check_info_stated`.
        DataError: the data doesn't fit the job; only where greetings aren't silent.
    """
    check_info_stated(job, task, at_a_site=at_a_site, has_budget=has_budget)
    if is_silent(job, has_budget=has_budget) and not _is_public(job, at_a_site=at_a_site):
        dataset = dataset.select([])
    return task.local_info(dataset, job.data, job.task.options)


def fitting_rows(job: Job, task: Task, dataset: Dataset, *, has_budget: bool = False) -> Dataset:
    """The rows to train on: all of them, or where greetings are silent, those that fit the job.

    An error about a row that doesn't fit would reveal that the row exists, even where no row is left, so such
    rows are left out without a message.
    """
    if not is_silent(job, has_budget=has_budget):
        return dataset
    rows = task.fits(dataset, job.data, job.task.options)
    return dataset if len(rows) == len(dataset) else dataset.select(rows)


def _is_public(job: Job, *, at_a_site: bool) -> bool:
    return not at_a_site and job.data.source in SOURCES


def _is_given(job: Job, key: str) -> bool:
    value: Any = job
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value is not None


def _reason(job: Job) -> str:
    if job.privacy.units:
        return f"privacy.unit = {job.privacy.unit!r}"
    return "a secure sum" if uses_secure_aggregation(job) else "the site's privacy budget"
