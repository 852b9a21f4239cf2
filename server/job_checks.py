"""Checks of a job that need neither its data nor torch, so that mistakes are reported at once."""

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
    """Check that the job's task, metrics, strategy and backbone exist, without loading them.

    Raises:
        ConfigError, WeightsError: a name is unknown, or the strategy can't merge this job's rounds.
    """
    check_task(job.task.name)
    check_metrics(job)
    check_merging(job)
    check_backbone(job.backbone)


def check_simulated(job: Job) -> None:
    """Check a job to be simulated: as `check_named`, and that its source and its partition exist.

    Raises:
        ConfigError, WeightsError: a name is unknown, or the strategy can't merge this job's rounds.
    """
    check_task(job.task.name)
    check_source(job)
    check_named(job)
    check_partition(job)


def source_of(job: Job) -> Source | Extension | None:
    """The built-in source or the extension's source that the job names; None for a path or a Hub data set.

    Raises:
        ConfigError: the name is unknown.
    """
    if Path(job.data.source).is_absolute() or job.data.is_on_hub:
        return None
    return source_named(job.data.source)


def check_source(job: Job) -> None:
    """Check that the job's source exists, that it fits the job's task, and that `data.options` are valid.

    Paths, Hub data sets and extensions' sources fit every task: they are read as the task reads files.

    Raises:
        ConfigError: the source is unknown or for other tasks, or `data.options` aren't its options.
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
    """Raises ConfigError unless the source accepts `data.options`; only extensions' sources have any."""
    source = ALL_SOURCES.get(job.data.source)
    if isinstance(source, Extension):
        checked_options(source.loaded(), job.data.options, "data.options")
    elif job.data.options:
        key = f"data.options.{next(iter(job.data.options))}"
        raise ConfigError(f"{key}: {job.data.source} has no options, expected none")


def validate_for_deployment(job: Job) -> None:
    """Raises ConfigError if the job needs what only a simulation has, or what sites must not reveal."""
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
