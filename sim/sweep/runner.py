"""The runs of a sweep, played by worker processes that stay: imports, data and baselines are had once."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from atoll.backbones.extract import Progress
from atoll.errors import JobError
from atoll.job.job import Job
from atoll.job.privacy import PrivacySection
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.server.rounds.run_state import Run
from atoll.server.run.result import Baselines
from atoll.server.run.run_job import validate_job
from atoll.sim.baselines import BaselineRunner
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.engines.process_pool import end_processes
from atoll.sim.population.population import Population
from atoll.sim.sweep.grid import Planned
from atoll.system.fork_server import import_first, worker_pool
from atoll.tasks import task_named

POPULATIONS_KEPT = 4
"""Populations, and baselines, that a worker keeps: runs come seed by seed."""


def check_all(runs: Iterable[Planned]) -> None:
    """Look at every combination, with one seed, before anything runs.

    Raises:
        ConfigError, WeightsError: it names something that there is not.
    """
    jobs = [run.job for run in runs]
    for job in jobs:
        if job.seed == jobs[0].seed:
            validate_job(job)


def precompute_features(
    jobs: Iterable[Job],
    progress: Progress | None,
    population_of: Callable[[Job], Population] = Population.of,
) -> None:
    """Compute the features that the jobs train and measure on, once, before several processes want them.

    Raises:
        ConfigError, DataError, WeightsError: data or weights aren't there.
    """
    different = {_features_of(job): job for job in jobs if job.tune.method == "head"}
    for job in different.values():
        population, task = population_of(job), task_named(job.task.name)
        roster = population.roster(job)
        roster.check(job)
        cached_test_set(population, progress)(Learner.of(job, task, task.merge_info(roster.data_info)))


def _features_of(job: Job) -> str:
    """What two jobs have in common whose examples have the same features."""
    parts = job.model_dump(mode="json", include={"task", "data", "backbone"})
    train = job.train
    parts["train"] = [train.threads, train.device, train.augment, train.cached_views]
    is_seeded = job.backbone.weights == "random" or train.cached_views is not None
    return json.dumps([parts, job.seed if is_seeded else None], sort_keys=True)


@dataclass
class WorkerCache:
    """What a worker process keeps from one run for the next."""

    populations: dict[str, Population] = field(default_factory=dict)
    baselines: dict[str, tuple[Baselines, list[str]]] = field(default_factory=dict)

    def play(self, job: Job, out: Path) -> None:
        """One run to its end; one that was begun goes on after its last whole round."""
        population = self.population(job)

        def compare(run: Run) -> tuple[Baselines, list[str]]:
            return self._compared(run, population)

        simulate(
            job,
            out,
            on_event=ignore_events,
            resume=(out / "job.toml").is_file(),
            population=population,
            baselines=compare,
            report=False,
        )

    def population(self, job: Job) -> Population:
        """The job's clients, which are another's of the same data, seed and number."""
        parts = job.model_dump(mode="json", include={"seed", "task", "data", "backbone"})
        key = json.dumps([parts, job.federation.clients], sort_keys=True)
        if key not in self.populations:
            _make_room(self.populations)
            self.populations[key] = Population.of(job)
        return replace(self.populations[key], job=job)

    def _compared(self, run: Run, population: Population) -> tuple[Baselines, list[str]]:
        """The baselines, which know nothing of a promise: they are those of the job without."""
        key = run.setup.job.model_copy(update={"privacy": PrivacySection()}).hash
        if key not in self.baselines:
            _make_room(self.baselines)
            self.baselines[key] = BaselineRunner(population)(run)
        return self.baselines[key]


def _make_room(populations: dict[str, Any]) -> None:
    while len(populations) >= POPULATIONS_KEPT:
        populations.pop(next(iter(populations)))


_worker_cache = WorkerCache()
"""In a worker process: what it keeps."""


def open_worker_cache() -> None:
    """In a new worker process: be silent, for the parent alone speaks to the user."""
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")


def play_run(job: str, out: str) -> str | None:
    """In a worker process: one run; what went wrong, in a line."""
    try:
        _worker_cache.play(Job.from_json(job), Path(out))
    except JobError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other runs
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True)
class WorkItem:
    """Work for one process: what it is known by, a function that a new process can import, its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]


@dataclass
class RunPool:
    """Worker processes that play runs; one that dies is replaced, and what it was at is tried once more.

    Who killed it is found out by playing those that were under way one at a time.
    """

    workers: int
    modules: tuple[str, ...] = ("atoll.sim.sweep.runner",)
    """What the runs import, for the fork server to import first."""
    _pool: list[ProcessPoolExecutor] = field(default_factory=list)
    _strikes: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Let the fork server import what the runs need, while others do something else."""
        self._started()

    def play(
        self,
        runs: Sequence[tuple[Planned, Path]],
        on_end: Callable[[Planned, str | None], None],
    ) -> dict[str, str]:
        """Play the runs; `on_end` hears of each that ends. Returns what went wrong, by the run's name."""
        failures: dict[str, str] = {}
        planned = {run.job.hash: run for run, _ in runs}
        waiting = deque(WorkItem(run.job.hash, play_run, (run.job.canonical, str(out))) for run, out in runs)

        def ended(piece: WorkItem, failure: str | None, died: str | None) -> None:
            run, failure = planned[piece.name], died or failure
            if failure is not None:
                failures[run.description] = failure
            on_end(run, failure)

        self.work(lambda: waiting.popleft() if waiting else None, ended)
        return failures

    def work(
        self, draw: Callable[[], WorkItem | None], ended: Callable[[WorkItem, Any, str | None], None]
    ) -> None:
        """Work off what `draw` gives, until it gives None while nothing is under way.

        It is asked when a process is free; None means that there is nothing now. `ended` hears what each
        piece returned, or that it killed its process twice.
        """
        waiting: deque[WorkItem] = deque()
        running: dict[Future[Any], WorkItem] = {}
        while True:
            while len(running) < self.workers:
                if not waiting:
                    drawn = draw()
                    if drawn is None:
                        break
                    waiting.append(drawn)
                if not self._has_room(waiting[0], list(running.values())):
                    break
                piece = waiting.popleft()
                running[self._submit(piece.function, *piece.arguments)] = piece
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                piece, result, died = running.pop(future), None, None
                try:
                    result = future.result()
                except BrokenProcessPool:
                    self._strikes[piece.name] += 1
                    if self._strikes[piece.name] == 1:
                        waiting.append(piece)
                        continue
                    died = "its worker process died twice; out of memory?"
                ended(piece, result, died)

    def _has_room(self, piece: WorkItem, running: Sequence[WorkItem]) -> bool:
        is_suspect = any(self._strikes[p.name] for p in (piece, *running))
        return len(running) < (1 if is_suspect else self.workers)

    def _submit(self, work: Callable[..., Any], *arguments: str) -> Future[Any]:
        try:
            return self._started().submit(work, *arguments)
        except BrokenProcessPool:
            self.close()
            return self._started().submit(work, *arguments)

    def _started(self) -> ProcessPoolExecutor:
        if not self._pool:
            import_first(*self.modules)
            self._pool.append(worker_pool(self.workers, open_worker_cache))
        return self._pool[0]

    def close(self) -> None:
        """End the processes at once; what they are at goes on from its last checkpoint next time."""
        while self._pool:
            end_processes(self._pool.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
