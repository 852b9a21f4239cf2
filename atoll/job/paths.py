"""The paths in a job file: relative to its folder there, absolute in the job that is made of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigError

if TYPE_CHECKING:
    from atoll.job.job import Job


def with_absolute_paths(job: Job, folder: Path, origin: str) -> Job:
    """Make the job's paths absolute, so that its resolved form replays from anywhere."""
    data = job.data.model_copy(
        update={
            "source": _absolute(job.data.source, folder, origin, "data.source"),
            "test": job.data.test and _absolute(job.data.test, folder, origin, "data.test"),
        }
    )
    backbone = job.backbone.model_copy(
        update={
            "name": _absolute(job.backbone.name, folder, origin, "backbone.name"),
            "weights": _absolute(job.backbone.weights, folder, origin, "backbone.weights"),
        }
    )
    devices = job.federation.devices
    if devices is not None:
        devices = _absolute(_as_path(devices), folder, origin, "federation.devices")
    federation = job.federation.model_copy(update={"devices": devices})
    changed: dict[str, Any] = {"data": data, "backbone": backbone, "federation": federation}
    if job.train.teacher is not None:
        teacher = _absolute(_as_path(job.train.teacher), folder, origin, "train.teacher")
        changed["train"] = job.train.model_copy(update={"teacher": teacher})
    return job.model_copy(update=changed)


def _as_path(value: str) -> str:
    """A value that is always a path, so that it looks like one."""
    return value if "/" in value or value.startswith("~") else f"./{value}"


def _absolute(value: str, folder: Path, origin: str, key: str) -> str:
    """A value that looks like a path (has a slash, `~`, or a dot in front), made absolute."""
    if "$" in value:
        raise ConfigError(f"{origin}: {key}: environment variables are not expanded, found {value!r}")
    if ":" in value.split("/")[0] or not (value.startswith((".", "~")) or "/" in value):
        return value
    if "\0" in value:
        raise ConfigError(f"{origin}: {key}: NUL cannot be part of a path, found {value!r}")
    return os.path.realpath(folder / os.path.expanduser(value))  # noqa: PTH111 - these raise at nothing
