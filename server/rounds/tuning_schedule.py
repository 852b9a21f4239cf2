"""Stages that train different parts of the model (`tune.then`): first the head, then more of the backbone.

A stage ends after its rounds, or when the clients' validation metric has stalled. The next stage starts from
the best model so far, with a new strategy state. Tensors that it trains for the first time have the values
that all clients hold already. A job without `tune.then` has one stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.tensors import Tensors
from atoll.report.run_result import RoundExtras
from atoll.server.events import StageBegun
from atoll.server.rounds.early_stopping import EarlyStopping, NoEarlyStopping, StoppingRule
from atoll.strategies.strategy import State
from atoll.tasks import task_named

if TYPE_CHECKING:
    from atoll.server.rounds.run_state import Run

PREFIX = "stage."
"""The prefix of the schedule's entries in a checkpoint."""


def stopping_of(job: Job, stage: int, learner: Learner) -> StoppingRule:
    """The stopping rule of a stage, by the next stage's `patience`; the last one's is `evaluate.patience`."""
    is_last = stage == len(job.tune.then)
    patience = job.evaluate.patience if is_last else job.tune.then[stage].patience
    return NoEarlyStopping() if patience is None else EarlyStopping(learner.task.primary_metric, patience)


def goes_on(run: Run) -> bool:
    """Whether there is a next round; begins the next stage where the present one is over."""
    return not is_over(run) or begin_next(run)


def is_over(run: Run) -> bool:
    """Whether the run's present stage has ended, by its rounds or by its stopping rule."""
    state, later = run.state, run.setup.job.tune.then
    if state.stopping.is_over:
        return True
    if state.stage == len(later):
        return False
    after = later[state.stage].after
    return after is not None and state.round - state.stage_start_round >= after


def begin_next(run: Run) -> bool:
    """Begin the next stage from the best model of the present one; False where there is no next stage."""
    setup, state = run.setup, run.state
    if state.stage == len(setup.job.tune.then):
        return False
    best = state.stopping.best or state.tensors
    switch_stage(run, state.stage + 1, state.round)
    initial = state.learner.initial()
    assert set(best) <= set(initial), "a later stage tunes what an earlier one has tuned"
    state.tensors, state.initial_model = initial | best, needed_by_baselines(setup.job, initial)
    state.strategy_state = setup.strategy.begin(state.tensors)
    setup.on_event(StageBegun(state.round, state.learner.job.tune.description))
    return True


def needed_by_baselines(job: Job, initial: Tensors) -> Tensors:
    """The model before training where the job's baselines need it, else no tensors, to save memory."""
    return initial if job.evaluate.baselines else {}


def switch_stage(run: Run, stage: int, start_round: int) -> None:
    """Build the learner of a stage and reset what it counts; the caller sets the tensors.

    Raises:
        ConfigError: this backbone has nothing that the stage could tune.
    """
    job, state = run.setup.job, run.state
    before = state.learner
    state.stage, state.stage_start_round = stage, start_round
    state.learner = Learner.of(
        job.stages[stage], task_named(job.task.name), before.data_info, before.progress
    )
    state.stopping = stopping_of(job, stage, state.learner)


def take_best_model(run: Run) -> None:
    """Use the best model by the clients' measurements as the final one, where early stopping kept one."""
    state = run.state
    if state.stopping.best:
        state.tensors = state.stopping.best
    state.ended_early = state.stopping.description or state.ended_early


def log_fields(run: Run) -> RoundExtras:
    """The log line's entry that describes what is trained, in jobs where that changes."""
    return {"tuning": run.state.learner.job.tune.description} if run.setup.job.tune.then else {}


def state_of(run: Run) -> State:
    """The checkpoint's entries of the schedule and of the stage's stopping rule."""
    state = run.state
    stopping = state.stopping.state()
    if not run.setup.job.tune.then:
        return stopping
    return stopping | {
        PREFIX + "number": float(state.stage),
        PREFIX + "began": float(state.stage_start_round),
    }


def resume(run: Run, saved: State) -> State:
    """Enter the stage in which a checkpoint was written; returns the entries that belong to others."""
    if PREFIX + "number" in saved and saved[PREFIX + "number"]:
        switch_stage(run, int(saved[PREFIX + "number"]), int(saved[PREFIX + "began"]))
        run.state.initial_model = needed_by_baselines(run.setup.job, run.state.learner.initial())
    rest = {name: value for name, value in saved.items() if not name.startswith(PREFIX)}
    return run.state.stopping.resume(rest)
