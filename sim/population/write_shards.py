"""Writing simulated clients' shards to disk, so that real sites can use the same data."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.server.job_checks import check_source
from atoll.sim.population.population import Population
from atoll.tasks import task_named

TEST = "held-out-test"


def write_shards(job: Job, out: Path) -> Sequence[str]:
    """Write one folder per client, in the task's format, and the test set; returns the clients' names.

    `out` is either complete or doesn't appear at all.

    Raises:
        ConfigError: `out` exists and isn't empty, or can't be written.
    """
    out = out.absolute()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"{out}: exists and is not empty, expected a new folder")
    check_source(job)
    population = Population.of(job)
    staging = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        names = _write_all(population, staging)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return names


def _write_all(population: Population, folder: Path) -> Sequence[str]:
    job = population.job
    task, names = task_named(job.task.name), population.names(job)
    for name in names:
        task.write(population.dataset(job, name), folder / name, job.data)
    if len(population.test):
        task.write(population.test, folder / TEST, job.data)
    return names
