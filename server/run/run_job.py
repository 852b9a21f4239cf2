"""Runs a job from beginning to end, over any transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from atoll.backbones.resolve import resolve
from atoll.data.diagnostics import Counts
from atoll.errors import JobError
from atoll.job.job import Job
from atoll.learning.compatibility import check_fits
from atoll.report.run_result import RunResult
from atoll.server.events import BaselinesBegun, EventCallback, FinalEvaluationBegun, ignore_events
from atoll.server.rounds.central_dp import LedgerLocation, central_dp_of
from atoll.server.rounds.loop import run_rounds
from atoll.server.rounds.participation import AvailabilityModel, always_available
from atoll.server.rounds.run_state import Run, TestSet
from atoll.server.rounds.start import start_or_resume
from atoll.server.run.directory import RunDirectory
from atoll.server.run.result import Baselines, write_result
from atoll.server.transport import Transport
from atoll.strategies import Strategy, build_strategy, check_merging
from atoll.system.memory import PeakMemory
from atoll.tasks import check_ghost_norms, check_metric_options, task_named

BaselineFn = Callable[[Run], tuple[Baselines, list[str]]]
"""A function that measures a run's baselines; it returns (metrics by baseline, notes for the result)."""


def server_baselines(run: Run) -> tuple[Baselines, list[str]]:
    """The baselines of a real federation: the model before training, but none that needs pooled data."""
    wanted, baselines, notes = run.setup.job.evaluate.baselines, {}, []
    test, learner = run.setup.test, run.state.learner
    if "zero_shot" in wanted and test is not None:
        baselines["zero_shot"] = learner.compute(learner.evaluate(run.state.initial_model, test))
    left_out = [name for name in wanted if name not in baselines]
    if left_out:
        notes.append(f"baselines left out, for data stays at the sites: {', '.join(left_out)}")
    return baselines, notes


def run_job(
    job: Job,
    carrier: Transport,
    out: Path,
    test_set: TestSet,
    *,
    baselines: BaselineFn = server_baselines,
    on_event: EventCallback = ignore_events,
    resume: bool = False,
    force: bool = False,
    clock: AvailabilityModel = always_available,
    ledgers: LedgerLocation | None = None,
    report: bool = True,
    strategy: Strategy | None = None,
    counts: Sequence[Counts] = (),
    data_hashes: Mapping[str, str] | None = None,
) -> RunResult:
    """Run a job into the directory `out`, and return its result.

    `carrier` is the transport to the clients. `test_set` returns the server's test set, `baselines` measures
    baselines, `on_event` is called with every event. `resume` continues the run in `out`, `force` replaces
    it. `clock` simulates which clients answer in time. Releases under client-level privacy are charged to
    `ledgers`, by default to a ledger of the run's own. `report` writes the HTML page. A `strategy` object is
    used instead of the one that the job names. `counts` say how much of a simulation's source is used, and
    `data_hashes` what each of its clients holds, by name: a run is not resumed with other data.

    Raises:
        InputError: the job or the clients' data does not fit; nothing was run.
        JobError: the run cannot go on, also because a disk is full; complete rounds are kept for `resume`.
    """
    started = time.monotonic()
    with (
        disk_errors_as_job_errors(out),
        RunDirectory.open(out, job, resume=resume, force=force, data_hashes=data_hashes) as directory,
        PeakMemory() as memory,
    ):
        protection = central_dp_of(job, out, ledgers)
        run = start_or_resume(
            job, carrier, directory, test_set, on_event, resume=resume, clock=clock, protection=protection,
            strategy=strategy, counts=counts,
        )  # fmt: skip
        directory.commit()
        run_rounds(run)
        on_event(BaselinesBegun())
        compared, notes = baselines(run)
        on_event(FinalEvaluationBegun())
        result = write_result(run, compared, time.monotonic() - started, notes, memory)
        if report:
            from atoll.report.page import (
                write_report,  # not before the first round: it is drawn after the last
            )

            write_report(out, result)
    return result


@contextmanager
def disk_errors_as_job_errors(out: Path) -> Iterator[None]:
    """Within the block, turn disk errors into a `JobError` whose line names the file."""
    try:
        yield
    except OSError as error:
        raise JobError(
            f"{error.filename or out}: cannot be written or read ({error.strerror or error}); once that is"
            " mended the run goes on with --resume"
        ) from error


def validate_job(job: Job) -> None:
    """Check all of a job that can be checked before any data is read.

    Raises:
        ConfigError, WeightsError: it names something that doesn't exist or isn't on this machine.
    """
    check_merging(job)
    build_strategy(job.strategy, job.federation, job.train, job.seed)
    check_metric_options(job)
    for stage in job.stages:
        check_fits(stage, task_named(job.task.name))
    check_ghost_norms(job)
    resolve(job.backbone, job.seed)
