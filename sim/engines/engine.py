"""Simulates a job on this machine, with a choice of engines."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from atoll.backbones.extract import Progress
from atoll.client.site import UNCACHED
from atoll.client.training.vmap import CLIENTS_PER_VMAP
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.determinism import names_gpu, shared_gpus
from atoll.learning.learner import Learner
from atoll.report.run_result import RunResult
from atoll.server.events import EventCallback
from atoll.server.run.directory import check_available
from atoll.server.run.run_job import BaselineFn, run_job, validate_job
from atoll.server.transport import Transport
from atoll.sim.attacks.hostile_clients import attacked
from atoll.sim.baselines import BaselineRunner
from atoll.sim.engines.events import ExecutionChosen, PopulationRead
from atoll.sim.engines.inline import InlineTransport, LoopTransport
from atoll.sim.engines.process_pool import PooledTransport, books_in, processes_for
from atoll.sim.population.devices import clock_of
from atoll.sim.population.population import Population
from atoll.strategies import Strategy
from atoll.tasks import task_named, trains_on_features

ENGINES = ("inline", "loop", "cohort", "ray")


def simulate(
    job: Job,
    out: Path,
    *,
    engine: str = "inline",
    workers: int = 1,
    on_event: EventCallback,
    progress: Progress | None = None,
    resume: bool = False,
    force: bool = False,
    population: Population | None = None,
    baselines: BaselineFn | None = None,
    report: bool = True,
    strategy: Strategy | None = None,
) -> RunResult:
    """Run a job in simulation and return its result, which is also written to `out` with model and report.

    `engine` is inline, loop, cohort or ray; `workers` is the number of processes or threads. The final bits
    depend neither on the engine nor on the number of workers, except with cohort. `on_event` is called with
    every event, `progress` with (done, total) while features are computed. `resume` continues the run in
    `out`, `force` replaces it. With `privacy.audit` the complete run is attacked. A caller with many jobs can
    pass the `population` and a function for `baselines`, and skip the `report`. A `strategy` object is used
    instead of the job's.

    Raises:
        InputError: the job, its data or the engine does not fit; nothing was run.
        JobError: the run could not go on.
    """
    check_engine(job, engine)
    check_available(out, job, resume=resume, force=force)
    validate_job(job)
    population = population or Population.of(job)
    on_event(PopulationRead(population))
    on_event(ExecutionChosen(execution_mode(job, engine, workers)))
    options: dict[str, Any] = {
        "baselines": baselines or BaselineRunner(population),
        "on_event": on_event,
        "resume": resume,
        "force": force,
        "clock": clock_of(population),
        "report": report,
        "strategy": strategy,
        "counts": population.source_counts,
        "data_hashes": population.data_hashes,
    }
    if engine == "ray":
        from atoll.sim.engines.ray import simulate_on_ray

        result = simulate_on_ray(job, out, workers, cached_test_set(population, progress), options)
    else:
        with ExitStack() as stack:
            carrier = attacked(_carrier(population, engine, workers, out, stack), job, population.names(job))
            result = run_job(job, carrier, out, cached_test_set(population, progress), **options)
    if job.privacy.audit:
        from atoll.sim.audit.audit import attack_at_the_end

        result = attack_at_the_end(job, population, out, result, on_event)
    return result


def check_engine(job: Job, engine: str) -> None:
    """Raises ConfigError unless the engine exists and supports all that the job asks for."""
    if engine not in ENGINES:
        raise ConfigError(f"engine: expected one of {', '.join(ENGINES)}, found {engine!r}")
    if engine == "ray" and names_gpu(job.train.device):
        raise ConfigError(
            f'train.device: on Ray, which shows each worker its own GPU only, expected "cuda" or "cpu", found'
            f' "{job.train.device}"'
        )
    by_magnitude = job.backbone.prune is not None and job.backbone.pruning == "magnitude"
    if engine == "cohort" and by_magnitude and not trains_on_features(job):
        raise ConfigError("backbone.prune: engine cohort would fill what was left out, try inline")
    if engine == "cohort" and job.train.teacher and not trains_on_features(job):
        raise ConfigError(
            "train.teacher: engine cohort trains such clients by the task's own loss, try inline"
        )
    if engine == "cohort" and job.task.options.get("packing"):
        raise ConfigError(
            "task.options.packing: engine cohort trains such clients at once, in one shape, try inline"
        )
    if engine == "cohort" and job.tune.then:
        raise ConfigError("tune.then: engine cohort has one way to train for a whole run, try inline")
    if engine == "cohort" and job.tune.method == "seeds":
        raise ConfigError("tune.method: engine cohort trains such clients by gradients, try inline")
    if engine == "cohort" and job.train.imbalance and not trains_on_features(job):
        raise ConfigError(
            "train.imbalance: engine cohort trains such clients at once by one loss, try inline"
        )
    if engine == "cohort" and job.personal.keep is not None and not trains_on_features(job):
        raise ConfigError("personal.keep: engine cohort trains clients from one start, try inline")
    if engine == "cohort" and job.strategy.keeps_client_state and not trains_on_features(job):
        raise ConfigError(
            f"strategy.name: engine cohort trains such clients without {job.strategy.name}'s corrections, try"
            " inline"
        )
    if engine == "cohort" and job.strategy.makes_clusters and not trains_on_features(job):
        raise ConfigError(
            f"strategy.name: engine cohort trains clients from one start, and {job.strategy.name}'s have"
            " several, try inline"
        )
    if engine == "cohort" and job.strategy.keeps_last_model:
        raise ConfigError("strategy.name: engine cohort trains such clients without a contrast, try inline")
    if engine == "cohort" and job.strategy.has_inner_steps and not trains_on_features(job):
        raise ConfigError("strategy.name: engine cohort trains such clients without inner steps, try inline")
    for key in job.train.autograd_only_keys if engine == "cohort" else ():
        raise ConfigError(
            f"train.{key}: engine cohort trains clients at once and has no such way, try inline"
        )


def default_workers(job: Job, engine: str) -> int:
    """The number of workers by default: 1 for heads, and on other engines than inline.

    Where clients train whole models on processors, it is the number of cores over the job's threads, but at
    most the number of clients in a round, and one per 4 GiB of memory. On GPUs it is their number, unless the
    job names one of them.
    """
    if engine != "inline" or all(trains_on_features(stage) for stage in job.stages):
        return 1
    federation = job.federation
    cohort = federation.cohort or math.ceil(federation.clients * (federation.cohort_rate or 1))
    if torch.device(job.train.device).type != "cpu":
        return min(shared_gpus(job.train.device), cohort)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(processes_for([job]), cohort, memory >> 32))


def _carrier(population: Population, engine: str, workers: int, out: Path, stack: ExitStack) -> Transport:
    job = population.job
    ledgers, memory = books_in(out)
    if engine == "loop":
        return LoopTransport.of(population, ledgers, memory)
    if engine == "cohort" and not trains_on_features(job):
        return InlineTransport.of(population, at_once=True, ledgers=ledgers, memory=memory)
    if workers > 1 and not all(trains_on_features(stage) for stage in job.stages):
        return stack.enter_context(PooledTransport(population, workers, out))
    return InlineTransport.of(population, workers, ledgers=ledgers, memory=memory)


def execution_mode(job: Job, engine: str, workers: int) -> str:
    """How clients train on this machine and why, in one line for display."""
    if engine == "loop":
        return "one client after the other, as --engine loop asks"
    if trains_on_features(job):
        heads = "a cohort's heads at once" if engine != "ray" else "heads in blocks on Ray"
        threads = f" in {workers} threads" if workers > 1 and engine != "ray" else ""
        views = job.train.cached_views
        seen = f", {views} views of every example are cached" if views else ""
        return f"{heads}{threads}: the backbone is frozen{seen}"
    if engine == "cohort":
        return (
            f"{CLIENTS_PER_VMAP} clients at once by torch.func, as --engine cohort asks:"
            " other bits than one by one, and dropout is drawn for all together"
        )
    places = "in this process" if workers == 1 else f"in {workers} processes"
    places = "on Ray" if engine == "ray" else places
    why = f"{job.tune.method} tunes the backbone" if job.tune.method != "head" else UNCACHED
    if job.tune.method == "head" and not task_named(job.task.name).uses_pooled_features:
        why = f"the head of {job.task.name} sees more than one row of features an example"
    states = job.train.cached_states
    start = f"; it starts at kept states ({states}) below what is tuned" if states else ""
    return f"one client after the other {places}: {why}{start}"


def cached_test_set(population: Population, progress: Progress | None) -> Callable[[Learner], Shard | None]:
    """A function that returns the test set, after computing all clients' features with every core."""

    def test_set(learner: Learner) -> Shard | None:
        learner.progress, job = progress, learner.job
        measured = job.data.keeps_back or not job.train.augment
        if learner.uses_features and measured:
            learner.features.keep(population.whole(learner), training=False)
        if learner.trains_on_features:
            learner.features.keep(population.whole(learner), training=True)
        test = population.test_shard(learner)
        if test is not None:
            learner.keep_states(test)
        if test is not None and learner.uses_features:
            learner.features.keep(test, training=False)
        return test

    return test_set
