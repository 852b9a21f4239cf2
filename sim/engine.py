"""Simulate a job on this machine with the engine that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol.job import Job
from server.play import check_job, play
from server.rounds import Watch
from server.rundir import check_free
from sim.baselines import Comparison
from sim.inline import InlineCarrier
from sim.population import Population
from sim.workers import PooledCarrier
from tasks.features import Progress
from tasks.learner import Learner
from tasks.seam import Shard

ENGINES = ("inline", "ray")


def simulate(
    job: Job,
    out: Path,
    *,
    engine: str = "inline",
    workers: int = 1,
    watch: Watch,
    progress: Progress | None = None,
    resume: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Run a job in simulation; returns what `result.json` holds.

    The final bits depend neither on the engine nor on the number of workers.
    """
    check_free(out, job, resume=resume, force=force)
    check_job(job)
    population = Population.of(job)
    watch("population", {"population": population})
    options: dict[str, Any] = {
        "baselines": Comparison(population),
        "watch": watch,
        "resume": resume,
        "force": force,
    }
    if engine == "ray":
        from sim.ray import simulate_on_ray

        return simulate_on_ray(job, out, workers, warmed(population, progress), options)
    if workers == 1 or job.tune.method == "head":
        return play(job, InlineCarrier.of(population, workers), out, warmed(population, progress), **options)
    with PooledCarrier(population, workers) as carrier:
        return play(job, carrier, out, warmed(population, progress), **options)


def warmed(population: Population, progress: Progress | None) -> Callable[[Learner], Shard | None]:
    """The test set; before it is handed out, all features are computed, with every core at work."""

    def test_set(learner: Learner) -> Shard | None:
        learner.progress = progress
        if learner.uses_features:
            learner.features(population.whole(learner))
        test = population.test_shard(learner)
        if test is not None and learner.uses_features:
            learner.features(test)
        return test

    return test_set
