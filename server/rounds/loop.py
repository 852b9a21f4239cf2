"""The rounds of a run: sample, send, train, validate, merge, evaluate, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from atoll.errors import BudgetExhausted
from atoll.protocol.tensors import size_of
from atoll.report.run_result import RoundExtras, RoundLine
from atoll.server.contributions.measured import round_contributions
from atoll.server.events import RoundEnded
from atoll.server.rounds import tuning_schedule
from atoll.server.rounds.aggregation import request_updates
from atoll.server.rounds.evaluation import evaluate
from atoll.server.rounds.round_log import log_line
from atoll.server.rounds.run_state import Run
from atoll.server.rounds.start import checkpoint_of
from atoll.server.rounds.validation import ValidatedUpdates
from atoll.system.memory import trim_freed_memory

logger = logging.getLogger(__name__)


def run_rounds(run: Run) -> None:
    """Run the remaining rounds; however this ends, the last complete round is on disk afterwards.

    A run whose next release would exceed the privacy budget ends after the rounds it has. With early
    stopping the run ends with its best model.
    """
    try:
        for round in rounds_left(run):
            run_round(run, round)
    except BudgetExhausted as spent:
        run.state.ended_early = str(spent)
        logger.warning("%s: the run ends after round %d", spent, run.state.round)
    finally:
        run.setup.later_rounds.close()
        run.setup.checkpoints.flush()
    tuning_schedule.take_best_model(run)


def rounds_left(run: Run) -> Iterator[int]:
    """The numbers of the remaining rounds, until the job's last one or until early stopping ends the run."""
    while run.state.round < run.setup.job.federation.rounds and tuning_schedule.goes_on(run):
        yield run.state.round + 1


def run_round(run: Run, round: int) -> None:
    """One round, from sampling to the checkpoint.

    Raises:
        BudgetExhausted: its release would exceed the privacy budget; nothing was released.
        InconsistentUpdates: too few clients sent usable updates.
    """
    started = time.monotonic()
    cohort = sample_cohort(run, round)
    gathered, simulated_time = request_updates(run, cohort, round)  # send, train, validate
    seconds_at_clients = time.monotonic() - started
    learn_of_clients(run, gathered, round)
    contributions = round_contributions(run, gathered.updates, round)
    merge(run, gathered, round)
    gathered = gathered.without_tensors()
    trim_freed_memory(size_of(run.state.tensors))
    metrics, validation = evaluate(run)
    more: RoundExtras = {
        "seconds": time.monotonic() - started,
        "seconds_at_clients": seconds_at_clients,
        **simulated_time,
        **validation,
        **contributions,
    }
    checkpoint(run, log_line(run, cohort, gathered, metrics, more))


def sample_cohort(run: Run, round: int) -> list[str]:
    """The names of this round's clients.

    Raises:
        BudgetExhausted: the round's release would exceed the privacy budget.
        ConfigError: too few clients for the noise mechanism, or other ones than the run began with.
    """
    protection = run.setup.protection
    protection.check_clients(run.setup.population)
    protection.check_budget(round)
    return run.setup.kind_of_round(round).sample(run, round)


def learn_of_clients(run: Run, gathered: ValidatedUpdates, round: int) -> None:
    """Update the selection rule's state by this round's updates, where the job has such a rule."""
    rule = run.setup.selection
    if rule is not None:
        run.state.selection = rule.after_round(run.state.selection, gathered.updates, round)


def merge(run: Run, gathered: ValidatedUpdates, round: int) -> None:
    """Compute the next global model and count the round as complete."""
    run.setup.kind_of_round(round).merge(run, gathered, round)
    run.state.round = round


def checkpoint(run: Run, line: RoundLine) -> None:
    """Log the round, and save what is needed to resume the run after it."""
    run.state.log.append(line)
    run.setup.directory.append_metrics(line)
    run.setup.checkpoints.save_async(checkpoint_of(run))
    run.setup.on_event(RoundEnded(line))
