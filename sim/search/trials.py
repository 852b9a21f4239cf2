"""The trials of a search, played by worker processes that stay; each is judged by what clients keep back.

The server's test set is not handed to a trial: there is nothing there that could be measured on it.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigError, JobError
from atoll.job.job import Job
from atoll.server.events import Event, EventCallback, RoundEnded, RunResumed, ignore_events
from atoll.server.rounds.evaluation import federated_evaluation
from atoll.server.rounds.run_state import Run
from atoll.server.run.result import Baselines
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.sim.search.space import checked_job
from atoll.sim.search.study import Outcome, Search, TrialResult, quiet_optuna
from atoll.sim.sweep.runner import RunPool, WorkerCache, WorkItem
from atoll.tasks.metric_values import MetricValues, lower_is_better

if TYPE_CHECKING:
    from optuna import Trial

MIN_COMPARED_TRIALS = 5
"""Whole trials that there must be before one is stopped for being worse than their median."""

WARM_UP = 4
"""The part of the rounds, one in so many, before which no trial is stopped."""


class Stopped(JobError):
    """A trial is worse than the median of those before it."""

    def __init__(self, round: int) -> None:
        super().__init__(f"stopped after round {round}")
        self.round = round


@dataclass
class Pruner:
    """Follows a trial's first run: a curve of the metric, and an end to it where it is behind.

    The median stopping rule (Golovin et al. 2017), by Optuna: the best so far against the median of what
    earlier trials had after as many rounds.
    """

    job: Job
    out: Path
    metric: str
    trial: Trial
    curve: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, out: Path, metric: str, curves: Sequence[Mapping[int, float]]) -> Pruner:
        """A judge that knows the curves of these whole trials."""
        from optuna.trial import TrialState, create_trial

        optuna = quiet_optuna()
        warm_up = job.federation.rounds // WARM_UP + 1  # the first round that may be the last
        study = optuna.create_study(
            direction="minimize" if lower_is_better(metric) else "maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=MIN_COMPARED_TRIALS, n_warmup_steps=warm_up),
        )
        for curve in curves:
            last = curve[max(curve)] if curve else math.nan
            if math.isfinite(last):
                study.add_trial(
                    create_trial(state=TrialState.COMPLETE, value=last, intermediate_values=dict(curve))
                )
        return cls(job, out, metric, study.ask())

    def on_event(self, event: Event) -> None:
        """Hear of a round, or, in a run that goes on, of all those before."""
        if isinstance(event, RunResumed):
            for text in (self.out / "metrics.jsonl").read_text("utf-8").splitlines():
                self._line(json.loads(text))
        elif isinstance(event, RoundEnded):
            self._line(event.line)

    def _line(self, line: Mapping[str, Any]) -> None:
        value, round = line["metrics"].get(self.metric), int(line["round"])
        if value is None or not math.isfinite(value) or round in self.curve:
            return
        self.curve[round] = value
        self.trial.report(value, round)
        if round < self.job.federation.rounds and self.trial.should_prune():
            raise Stopped(round)


def without_test_set(job: Job, population: Population) -> Population:
    """The same clients, and a server that holds no test set; the job may have another seed."""
    return replace(population, job=job, test=population.test.select([]))


_bench = WorkerCache()
"""In a worker process: the populations that it keeps."""


def play_trial(text: str) -> str:
    """In a worker process: the runs of one trial, as `_piece` describes them; its outcome."""
    work = json.loads(text)
    jobs = [Job.from_json(job) for job in work["jobs"]]
    curves = [{int(step): value for step, value in curve.items()} for curve in work["curves"]]
    outs = [Path(out) for out in work["outs"]]
    judge, started = Pruner.of(jobs[0], outs[0], work["metric"], curves), time.monotonic()
    measured: list[MetricValues] = []
    outcome = Outcome()
    try:
        # Every seed's run is on the first seed's clients: dealt anew, what is held out as test set for one
        # would be validated on by another.
        clients = _bench.population(jobs[0])
        for job, out in zip(jobs, outs, strict=True):
            on_event = judge.on_event if job is jobs[0] else ignore_events
            measured.append(validation_metrics(job, out, without_test_set(job, clients), on_event))
        outcome = judged(measured, work["metric"])
    except Stopped as stopped:
        outcome = Outcome(stopped=stopped.round)
    except JobError as error:
        outcome = Outcome(refused=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not stop the other trials
        outcome = Outcome(failed=f"{type(error).__name__}: {error}")
    whole = replace(outcome, curve=judge.curve, seconds=time.monotonic() - started)
    return json.dumps(vars(whole))


def validation_metrics(job: Job, out: Path, population: Population, on_event: EventCallback) -> MetricValues:
    """Play a run, or go on with one that was begun; its final model's metrics over all clients' splits."""
    metrics: MetricValues = {}

    def measure(run: Run) -> tuple[Baselines, list[str]]:
        state = run.state
        is_known = not state.stopping.best and state.round % job.evaluate.every == 0 and state.log
        metrics.update(state.log[-1]["metrics"] if is_known else federated_evaluation(run))
        return {}, []

    begun = (out / "job.toml").is_file()
    simulate(
        job, out, on_event=on_event, resume=begun, population=population, baselines=measure, report=False
    )  # fmt: skip
    return metrics


def judged(measured: Sequence[Mapping[str, float | None]], metric: str) -> Outcome:
    """The mean over a trial's seeds; refused where there is nothing that can be compared."""
    if not all(metric in one for one in measured):
        return Outcome(refused="no client keeps anything back to measure on")
    by_name = {name: [value for one in measured if (value := one[name]) is not None] for name in measured[0]}
    metrics = {name: fmean(values) for name, values in by_name.items() if len(values) == len(measured)}
    if metric not in metrics:
        return Outcome(refused=f"its {metric} is undefined")
    return Outcome(value=metrics[metric], metrics=metrics)


def play_trials(
    search: Search, crew: RunPool, count: int, on_end: Callable[[TrialResult, Sequence[TrialResult]], None]
) -> list[TrialResult]:
    """Try until `count` trials have ended, or nothing is left to try; those that were begun first.

    `on_end` hears of each trial that ends, and of all trials so far.
    """
    tried = search.trials()
    again = deque(one.index for one in tried if one.outcome is None or one.outcome.failed is not None)
    for place in again:
        if tried[place].outcome is not None:
            tried[place] = search.begin(place, tried[place].texts)
    running: dict[str, int] = {}

    def draw() -> WorkItem | None:
        if again:
            if not search.may_begin(again[0], tried):
                return None
            place = again.popleft()
        elif len(tried) < count and search.may_begin(len(tried), tried):
            new = search.next(tried)
            if new is None:
                return None
            tried.append(new)
            place = new.index
        else:
            return None
        piece = _piece(search, tried[place], tried)
        running[piece.name] = place
        return piece

    def ended(piece: WorkItem, result: str | None, died: str | None) -> None:
        place = running.pop(piece.name)
        outcome = Outcome(failed=died) if result is None else Outcome.from_json(result)
        tried[place] = search.end(tried[place], outcome)
        on_end(tried[place], tried)

    crew.work(draw, ended)
    return tried


def _piece(search: Search, one: TrialResult, tried: Sequence[TrialResult]) -> WorkItem:
    seeds = [one.job.seed + offset for offset in range(search.seeds)]
    jobs = [Job.parse(one.job.model_dump(mode="json") | {"seed": seed}, origin="trial") for seed in seeds]
    work = {
        "jobs": [job.canonical for job in jobs],
        "outs": [str(search.path / one.folder / f"seed-{seed}") for seed in seeds],
        "metric": search.metric,
        "curves": search.curves_before(one.index, tried),
    }
    return WorkItem(one.job.hash, play_trial, (json.dumps(work),))


def feature_jobs(search: Search) -> list[Job]:
    """The jobs whose features the trials may need: the job's, and with each value that changes them."""
    combinations: list[Mapping[str, str]] = [{}]
    for one in search.space.keys:
        if one.key.startswith("backbone.") or one.key in (
            "tune.method", "train.augment", "train.cached_views", "train.threads",
        ):  # fmt: skip
            combinations += [{one.key: text} for text in one.ends]
    jobs = []
    for texts in combinations:
        try:
            jobs.append(checked_job(search.base, texts))
        except ConfigError:  # it is none alone; the trials that have it compute what they need
            continue
    return jobs
