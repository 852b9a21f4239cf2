"""The registry of partitions, which divide one source among simulated clients."""

from __future__ import annotations

from dataclasses import dataclass

from atoll.job.extension_options import checked_options
from atoll.job.job import Job, OtherPartition
from atoll.plugins import BUILT_IN, Extension, Registry


@dataclass(frozen=True)
class Entry:
    """One line of the registry: a summary of a partition, and an example of its use in a job."""

    summary: str
    example: str
    origin: str = BUILT_IN
    extension: Extension | None = None


def _of(extension: Extension) -> Entry:
    return Entry(extension.summary, f'{{ kind = "{extension.name}" }}', extension.origin, extension)


PARTITIONS = Registry(
    "partition",
    {
        "iid": Entry("every client alike", '{ kind = "iid" }'),
        "dirichlet": Entry("label skew", '{ kind = "dirichlet", alpha = 0.3 }'),
        "pathological": Entry("few classes a client", '{ kind = "pathological", classes_per_client = 2 }'),
        "natural": Entry("one client a value of a column", '{ kind = "natural", by = "hospital" }'),
        "resampled": Entry(
            "each client draws its own, any number of them", '{ kind = "resampled", examples = 50 }'
        ),
    },
    _of,
)


def check_partition(job: Job) -> None:
    """Raises ConfigError if there is no partition of this name; its options are checked when it is used."""
    if isinstance(job.data.partition, OtherPartition):
        PARTITIONS.check(job.data.partition.kind, "data.partition.kind")


def brought_partition(rule: OtherPartition) -> tuple[Extension, tuple[object, ...]]:
    """(an extension's partition, further arguments of its function: its options, if it has any).

    Raises:
        ConfigError: there is no partition of this name, or its options are invalid.
    """
    PARTITIONS.check(rule.kind, "data.partition.kind")
    extension = PARTITIONS[rule.kind].extension
    assert extension is not None
    extension = extension.loaded()
    return extension, checked_options(extension, rule.options, "data.partition.options")
