"""Write simulated clients' shards to disk, so that real sites can hold what the simulation held."""

from __future__ import annotations

from pathlib import Path

from protocol.errors import ConfigError
from protocol.job import Job
from sim.population import Population
from tasks import task_named

TEST = "held-out-test"


def write_shards(job: Job, out: Path) -> list[str]:
    """A folder a client, in the task's own format, and the test set beside them; the clients' names.

    The folder appears whole or not at all.

    Raises:
        ConfigError: `out` exists and isn't empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty, expected a new folder")
    population = Population.of(job)
    task = task_named(job.task.name)
    staging = out.with_name(f".{out.name}.partial")
    try:
        names = population.names(job)
        for name in names:
            task.write(population.dataset(job, name), staging / name)
        if len(population.test):
            task.write(population.test, staging / TEST)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror})") from None
    return names
