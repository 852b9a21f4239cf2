"""What can be said of a job at once: before any data is read, and before torch is there."""

from __future__ import annotations

from pathlib import Path

from atoll.backbones.resolve import check_backbone
from atoll.datasets.registry import ALL_SOURCES, SOURCES, Source, source_named
from atoll.errors import ConfigError
from atoll.job.extension_options import checked_options
from atoll.job.job import Job
from atoll.job.partitions import check_partition
from atoll.plugins import Extension
from atoll.strategies import check_merging
from atoll.tasks import check_metrics, check_task, task_named
from atoll.tasks.data_info import check_info_stated, is_silent


def check_named(job: Job) -> None:
    """See whether the task, the strategy and the backbone that the job names are there; none is loaded.

    Raises:
        ConfigError, WeightsError: there is none of that name, or the strategy can't merge such rounds.
    """
    check_task(job.task.name)
    check_metrics(job)
    check_merging(job)
    check_backbone(job.backbone)


def check_simulated(job: Job) -> None:
    """As `check_named`, of a run on this machine, whose data is the job's own source.

    Raises:
        ConfigError, WeightsError: there is none of that name.
    """
    check_task(job.task.name)
    check_source(job)
    check_named(job)
    check_partition(job)


def source_of(job: Job) -> Source | Extension | None:
    """The source that the job names, Atoll's own or an extension's; None for a path or one of the Hub.

    Raises:
        ConfigError: it is neither.
    """
    if Path(job.data.source).is_absolute() or job.data.is_on_hub:
        return None
    return source_named(job.data.source)


def check_source(job: Job) -> None:
    """See whether the source is a path, one of the Hub, or a name of one that holds data of the job's task.

    An extension's may be for any task: what it returns is read as that task reads files.

    Raises:
        ConfigError: it is none of these, or `data.options` aren't its options.
    """
    source = source_of(job)
    check_source_options(job)
    if isinstance(source, Source) and job.task.name not in source.tasks:
        fitting = [name for name, other in SOURCES.items() if job.task.name in other.tasks]
        tasks = " and ".join(source.tasks)
        raise ConfigError(
            f"data.source: {source.name} is for {tasks}, the job's task is {job.task.name};"
            f" expected {' or '.join([*fitting, 'a path'])}"
        )


def check_source_options(job: Job) -> None:
    """Raises ConfigError unless `data.options` are the source's: none where it isn't an extension's."""
    source = ALL_SOURCES.get(job.data.source)
    if isinstance(source, Extension):
        checked_options(source.loaded(), job.data.options, "data.options")
    elif job.data.options:
        key = f"data.options.{next(iter(job.data.options))}"
        raise ConfigError(f"{key}: {job.data.source} has no options, expected none")


def validate_for_deployment(job: Job) -> None:
    """Raises ConfigError if the job asks for what only a simulation has, or what no site may tell."""
    if job.federation.devices is not None:
        raise ConfigError(
            "federation.devices: simulates devices, a real federation has its own; expected a job without"
            " devices, deadline and over_sampling (round_timeout is the real deadline)"
        )
    if job.privacy.seeded_noise:
        raise ConfigError(
            "privacy.seeded_noise: anybody who has the job can subtract such noise, so a real federation"
            " takes none of it; expected false"
        )
    if job.privacy.audit:
        raise ConfigError(
            "privacy.audit: the attack trains the run again on all clients' data, so only a simulation can be"
            " attacked; expected false"
        )
    if job.attack.kind is not None:
        raise ConfigError(
            "attack.kind: makes simulated clients hostile, and sites do what they were installed for;"
            f" expected a job without [attack], found {job.attack.kind!r}"
        )
    check_source_options(job)
    if is_silent(job):
        check_info_stated(job, task_named(job.task.name), at_a_site=True)
