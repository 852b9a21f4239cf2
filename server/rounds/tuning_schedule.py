"""What is tuned can change on the way (`tune.then`): first the head, then more of the backbone.

A stage ends after its rounds, or when what clients measure on the data they kept back has stalled. The next
one starts from the best model so far, with a strategy that begins anew. All it tunes beyond what was tuned
before has the values that every client has already. A job without `tune.then` has one stage.
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
"""Before the names of what a checkpoint keeps of the schedule."""


def stopping_of(job: Job, stage: int, learner: Learner) -> StoppingRule:
    """What ends a stage by measurements: the next one's patience, or at last the run's own."""
    is_last = stage == len(job.tune.then)
    patience = job.evaluate.patience if is_last else job.tune.then[stage].patience
    return NoEarlyStopping() if patience is None else EarlyStopping(learner.task.primary_metric, patience)


def goes_on(run: Run) -> bool:
    """Whether a next round makes sense; begins the next stage where the present one is over."""
    return not is_over(run) or begin_next(run)


def is_over(run: Run) -> bool:
    """Whether nothing more is to come of the run's present stage."""
    state, later = run.state, run.setup.job.tune.then
    if state.stopping.is_over:
        return True
    if state.stage == len(later):
        return False
    after = later[state.stage].after
    return after is not None and state.round - state.stage_start_round >= after


def begin_next(run: Run) -> bool:
    """Tune what the next stage tunes, from the best model of the one before; False where there is none."""
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
    """The model before training, which only baselines ask for: without any, nothing of it is held."""
    return initial if job.evaluate.baselines else {}


def switch_stage(run: Run, stage: int, start_round: int) -> None:
    """Have the learner of a stage at hand; the tensors are the caller's to set.

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
    """End with the best model by the clients' measurements, where early stopping has looked for one."""
    state = run.state
    if state.stopping.best:
        state.tensors = state.stopping.best
    state.ended_early = state.stopping.description or state.ended_early


def log_fields(run: Run) -> RoundExtras:
    """What a round's line says of the schedule: what is tuned, where that changes."""
    return {"tuning": run.state.learner.job.tune.description} if run.setup.job.tune.then else {}


def state_of(run: Run) -> State:
    """What a checkpoint keeps of the schedule and of what would end its stage."""
    state = run.state
    stopping = state.stopping.state()
    if not run.setup.job.tune.then:
        return stopping
    return stopping | {
        PREFIX + "number": float(state.stage),
        PREFIX + "began": float(state.stage_start_round),
    }


def resume(run: Run, saved: State) -> State:
    """Enter the stage that a checkpoint was written in; what is left is the strategy's."""
    if PREFIX + "number" in saved and saved[PREFIX + "number"]:
        switch_stage(run, int(saved[PREFIX + "number"]), int(saved[PREFIX + "began"]))
        run.state.initial_model = needed_by_baselines(run.setup.job, run.state.learner.initial())
    rest = {name: value for name, value in saved.items() if not name.startswith(PREFIX)}
    return run.state.stopping.resume(rest)
