"""What is tuned can change on the way (`tune.then`): first the head, then more of the backbone.

A stage ends after its rounds, or when what clients measure on the data they kept back has stalled. The next
one starts from the best model so far, with a strategy that begins anew. All it tunes beyond what was tuned
before has the values that every client has already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from atoll.learning.learner import Learner
from atoll.server.rounds.early_stopping import Stopping
from atoll.strategies.strategy import State
from atoll.tasks import task_named

if TYPE_CHECKING:
    from atoll.server.rounds.loop import Run

PREFIX = "stage."
"""Before the names of what a checkpoint keeps of the schedule."""


def stopping_of(run: Run) -> Stopping | None:
    """What ends the present stage by measurements: the next one's patience, or at last the run's own."""
    later = run.job.tune.then[run.stage] if run.stage < len(run.job.tune.then) else None
    patience = run.job.evaluate.patience if later is None else later.patience
    return None if patience is None else Stopping(run.learner.task.headline, patience)


def is_over(run: Run) -> bool:
    """Whether nothing more is to come of the run's present stage."""
    if run.stopping is not None and run.stopping.is_over:
        return True
    if run.stage == len(run.job.tune.then):
        return False
    after = run.job.tune.then[run.stage].after
    return after is not None and run.round - run.began >= after


def begin_next(run: Run) -> bool:
    """Tune what the next stage tunes, from the best model of the one before; False where there is none."""
    if run.stage == len(run.job.tune.then):
        return False
    best = run.tensors if run.stopping is None else run.stopping.best or run.tensors
    enter(run, run.stage + 1, run.round)
    first = run.learner.initial()
    assert set(best) <= set(first), "a later stage tunes what an earlier one has tuned"
    run.tensors, run.first_model = first | best, first
    run.state = run.strategy.begin(run.tensors)
    run.watch("stage", {"round": run.round, "tuning": run.learner.job.tune.words})
    return True


def enter(run: Run, stage: int, began: int) -> None:
    """Have the learner of a stage at hand; the tensors are the caller's to set.

    Raises:
        ConfigError: this backbone has nothing that the stage could tune.
    """
    run.stage, run.began, before = stage, began, run.learner
    task = task_named(run.job.task.name)
    run.learner = Learner.of(run.job.stages[stage], task, before.facts, before.progress)
    run.stopping = stopping_of(run)


def state_of(run: Run) -> State:
    """What a checkpoint keeps of the schedule and of what would end its stage."""
    stopping = {} if run.stopping is None else run.stopping.state()
    if not run.job.tune.then:
        return stopping
    return stopping | {PREFIX + "number": float(run.stage), PREFIX + "began": float(run.began)}


def resume(run: Run, state: State) -> State:
    """Enter the stage that a checkpoint was written in; what is left is the strategy's."""
    if PREFIX + "number" in state and state[PREFIX + "number"]:
        enter(run, int(state[PREFIX + "number"]), int(state[PREFIX + "began"]))
        run.first_model = run.learner.initial()
    rest = {name: value for name, value in state.items() if not name.startswith(PREFIX)}
    return rest if run.stopping is None else run.stopping.resume(rest)
