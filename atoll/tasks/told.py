"""What a client's greeting tells of its data, field by field, and what the job must give instead.

Where privacy is promised, under a secure sum, and at a site with a budget a greeting tells nothing of the
data: server, simulation and site ask the functions here, so that what one refuses to be asked for the others
refuse too.
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
"""Classes that clients may tell of; where there are more, the job names them."""


@dataclass(frozen=True)
class ToldField:
    """One field of `local_info`.

    It `concerns` nobody ("public": job and installed code fix it), a client's data as a whole, or maybe a
    single example. `given_by` is the key by which a job gives it, so that no client is asked, and `what` that
    key holds, in words. The field `holds` different names, texts, a whole number from -1 on, or yes and no,
    and `at_most` so many names or texts, or that number: the server refuses greetings of any other form.
    """

    name: str
    concerns: Concerns
    given_by: str = ""
    what: str = ""
    holds: Holds = "anything"
    at_most: int = MOST_CLASSES


PINNED = ToldField("pinned", "public", holds="flag")
"""That the job names the classes itself."""


def is_silent(job: Job, *, has_budget: bool = False) -> bool:
    """Whether a greeting tells nothing of the data, not even how much there is."""
    return bool(job.privacy.units) or uses_secure_aggregation(job) or has_budget


def fields_told(task: Task, job: Job) -> Sequence[ToldField] | None:
    """What the task says that its greetings tell; None where it says nothing of its own `local_info`."""
    lines = [vars(kind) for kind in type(task).__mro__]
    speaks = next((place for place, line in enumerate(lines) if "local_info" in line), len(lines))
    declares = next(
        (place for place, line in enumerate(lines) if "told" in line or "told_for" in line), len(lines)
    )
    return None if declares > speaks or declares == len(lines) else task.told_for(job)


def check_told(job: Job, task: Task, *, at_a_site: bool = False, has_budget: bool = False) -> None:
    """See whether nothing has to be told that the job hasn't given.

    What a built-in source holds is public, but at a real site the data is another.

    Raises:
        ConfigError: a greeting would tell something of the data; the line names the key to set.
    """
    if not is_silent(job, has_budget=has_budget) or _is_public(job, at_a_site=at_a_site):
        return
    fields, why = fields_told(task, job), _reason(job)
    if fields is None:
        raise ConfigError(
            f"task.name: {task.name} does not declare what its greetings tell of the data (`told`),"
            f" expected another task with {why}"
        )
    for field in fields:
        if field.concerns == "public" or (field.given_by and _is_given(job, field.given_by)):
            continue
        if not field.given_by:
            raise ConfigError(
                f"task.name: with {task.name} clients tell {field.name!r} of their data, and no key of the"
                f" job can give it instead; expected another task with {why}"
            )
        raise ConfigError(
            f"{field.given_by}: missing, expected {field.what or field.name} with {why}:"
            " one made from the data would tell what clients hold"
        )


def greeting_info(
    job: Job, task: Task, dataset: Dataset, *, at_a_site: bool = False, has_budget: bool = False
) -> DataInfo:
    """The facts of a greeting; where it is silent they are made without a look at any row.

    Raises:
        ConfigError: as `check_told`.
        DataError: the data doesn't fit the job; only where a greeting may tell that.
    """
    check_told(job, task, at_a_site=at_a_site, has_budget=has_budget)
    if is_silent(job, has_budget=has_budget) and not _is_public(job, at_a_site=at_a_site):
        dataset = dataset.select([])
    return task.local_info(dataset, job.data, job.task.options)


def fitting_rows(job: Job, task: Task, dataset: Dataset, *, has_budget: bool = False) -> Dataset:
    """The rows that are learnt from: where greetings are silent, without those that don't fit the job.

    To refuse would tell of a single row that it is there, also where no row is left. Anywhere else none is
    left out.
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
