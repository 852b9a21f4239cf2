"""The rounds of a run: sample, send, train, check, merge, evaluate, checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from atoll.data.shard import Shard
from atoll.errors import BudgetExhausted, ConfigError, InconsistentUpdates
from atoll.job.closed_form import STATISTICS, forms_head
from atoll.job.job import Job
from atoll.job.privacy import expected_cohort, hides_cohorts, sums_securely
from atoll.learning.learner import Learner, added
from atoll.learning.trainable import without_pruned
from atoll.protocol.compression import upload_size
from atoll.protocol.messages import CHARGED_ROUNDS, Failure, Measurement, Request, Update
from atoll.protocol.random_streams import stream
from atoll.protocol.stacked_updates import StackedUpdates, stacked_states
from atoll.protocol.tensors import Tensors, size_of, tensors_sha256
from atoll.server.rounds import tuning_schedule
from atoll.server.rounds.central_dp import Protection, run_key
from atoll.server.rounds.closed_form import formed, screen_statistics, statistics_size
from atoll.server.rounds.cohort import round_up, sample, some
from atoll.server.rounds.decompression import decompressed
from atoll.server.rounds.early_stopping import Stopping
from atoll.server.rounds.participation import Call, Clock, Turnout, elapsed, everybody
from atoll.server.rounds.secure_aggregation import SecureRound
from atoll.server.rounds.validation import Screened, screen, screen_stack
from atoll.server.run.checkpoint import Checkpoint, Keeper
from atoll.server.run.directory import RunDirectory
from atoll.server.transport import Carrier
from atoll.strategies import build_strategy
from atoll.strategies.strategy import State, Strategy
from atoll.tasks import task_named

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times a round below its quorum is tried before the run fails."""

Watch = Callable[[str, dict[str, Any]], None]
"""Told of every step: a name (`hello`, `round`, …) and what there is to show."""

TestSet = Callable[[Learner], Shard | None]
"""The server's own test set, once the run's facts are known."""


@dataclass
class Run:
    """One run in progress: what is fixed for all of its rounds, and where it has got to."""

    job: Job
    carrier: Carrier
    directory: RunDirectory
    learner: Learner
    strategy: Strategy
    population: Sequence[str]
    tensors: Tensors
    state: State
    test: Shard | None
    watch: Watch
    round: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    first_model: Tensors = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    clock: Clock = everybody
    protection: Protection | None = None
    stopping: Stopping | None = None
    stage: int = 0
    began: int = 0
    ended_early: str = ""
    is_jobs_strategy: bool = True
    """Whether the strategy is the one that the job names."""

    @property
    def is_private(self) -> bool:
        """Whether privacy is promised; what clients hold is then never published in the clear."""
        return bool(self.job.privacy.units)

    @property
    def whole(self) -> Tensors | None:
        """The model that all share, where norms are kept with the first ones; None where heads are kept."""
        if self.job.personal.keep == "head":
            return None
        return {**self.learner.own, **self.tensors}

    @property
    def upload(self) -> int:
        """Bytes of one client's update as it travels."""
        return upload_size(self.job, self.tensors)

    @cached_property
    def keeper(self) -> Keeper:
        """Puts its checkpoints on the disk."""
        return Keeper(self.directory.checkpoints)


def open_run(
    job: Job,
    carrier: Carrier,
    directory: RunDirectory,
    test_set: TestSet,
    watch: Watch,
    *,
    resume: bool,
    clock: Clock = everybody,
    protection: Protection | None = None,
    strategy: Strategy | None = None,
) -> Run:
    """Greet the clients, agree on the facts, and start at round 0 or at the last checkpoint.

    Raises:
        ConfigError, WeightsError, DataError: the job cannot run here, or with these clients.
    """
    is_jobs_strategy = strategy is None
    strategy = build_strategy(job.strategy) if strategy is None else strategy
    roll = carrier.hello(job)
    roll.check(job)
    task = task_named(job.task.name)
    learner = Learner.of(job.stages[0], task, task.agree(roll.facts))
    learner.facts = learner.facts | learner.given
    torch.set_num_threads(job.train.threads)
    first = learner.initial()
    shared = {name: t for name, t in first.items() if name not in learner.own}
    watch("hello", {"roll": roll, "backbone": learner.backbone, "facts": learner.facts})
    run = Run(
        job, carrier, directory, learner, strategy, roll.names, shared, strategy.begin(shared),
        test_set(learner), watch, first_model=first, clock=clock, protection=protection,
        is_jobs_strategy=is_jobs_strategy,
    )  # fmt: skip
    run.stopping = tuning_schedule.stopping_of(run)
    found = directory.latest_checkpoint(job.hash) if resume else None
    if found is not None:
        _continue_from(run, found)
    return run


def _continue_from(run: Run, found: Checkpoint) -> None:
    if found.facts != run.learner.facts:
        changed = sorted(
            k for k in {*found.facts, *run.learner.facts} if found.facts.get(k) != run.learner.facts.get(k)
        )
        raise ConfigError(f"cannot resume: changed since the checkpoint: {', '.join(changed)}")
    run.round, run.tensors, run.state = found.round, found.tensors, tuning_schedule.resume(run, found.state)
    run.bytes_up, run.bytes_down = found.bytes_up, found.bytes_down
    run.log = run.directory.wind_back(found.round)
    run.watch("resumed", {"round": run.round})


def all_rounds(run: Run) -> None:
    """Play the rounds that are left; however it ends, the last whole round is on the disk then.

    A run whose next release would overspend ends with the rounds it has; one that stops early, or could
    have, with its best model.
    """
    try:
        while run.round < run.job.federation.rounds:
            if tuning_schedule.is_over(run) and not tuning_schedule.begin_next(run):
                break
            play_round(run)
    except BudgetExhausted as spent:
        run.ended_early = str(spent)
        logger.warning("%s: the run ends after round %d", spent, run.round)
    finally:
        run.keeper.save_last()
    if run.stopping is not None and run.stopping.best:
        run.tensors, run.ended_early = run.stopping.best, run.stopping.words


def play_round(run: Run) -> None:
    """One round, from sampling to the checkpoint."""
    started = time.monotonic()
    round = run.round + 1
    if run.protection is not None:
        run.protection.check_budget(round)
    coins = None if run.protection is None else partial(run.protection.coins, round)
    cohort = sample(run.population, run.job, round, coins)
    screened, simulated = train(run, cohort, round)
    at_clients = time.monotonic() - started
    if screened.statistics:
        run.tensors = formed(run.job, screened.statistics)
    else:
        merge(run, screened.updates, round)
    run.round = round
    is_measured = round % run.job.evaluate.every == 0
    metrics = measure(run) if is_measured else {}
    if run.stopping is not None and is_measured:
        validation = validated(run)
        run.stopping.note(round, validation.get(run.stopping.metric, math.nan), run.tensors)
        simulated = {**simulated, "validation": validation}
    seconds = {"seconds": time.monotonic() - started, "seconds_at_clients": at_clients}
    line = _log_line(run, cohort, screened, metrics, seconds | simulated)
    run.log.append(line)
    run.directory.append_metrics(line)
    run.keeper.keep(checkpoint_of(run))
    if run.job.remembers or (run.is_private and not run.job.privacy.seeded_noise):
        # Clients remember few rounds; and a private round that is lost is charged a second time.
        run.keeper.save_last()
    run.watch("round", line)


def merge(run: Run, updates: Sequence[Update], round: int) -> None:
    """The next global model: of the updates, or of nothing but their noised sum."""
    kept: State = {}
    if run.protection is not None:
        noised, kept = run.protection.merged(round, updates, run.tensors, run.state)
        updates = [noised]
    if updates:
        run.tensors, run.state = run.strategy.merge(run.tensors, updates, run.state)
    if run.job.backbone.prune is not None and not run.learner.uses_features:
        run.tensors = without_pruned(run.learner.model, run.tensors)  # noise has no holes
    run.state = {**run.state, **kept}


def train(run: Run, cohort: Sequence[str], round: int) -> tuple[Screened, dict[str, Any]]:
    """Send the model to the cohort and collect usable updates; and what is logged of simulated time.

    Raises:
        InconsistentUpdates: fewer than the quorum came back, several times over.
    """
    goal = min(run.job.federation.cohort or len(cohort), len(cohort))
    needed = max(1, round_up(run.job.federation.quorum * goal))
    down, up = size_of(run.tensors), run.upload
    if forms_head(run.job, round):
        down, up = 0, statistics_size(run.job, run.tensors)
    before = elapsed(run.log)
    for attempt in range(1, ATTEMPTS + 1):
        turnout = run.clock(Call(round, attempt, cohort, goal, down, up))
        request = _request(run, "train", round, run.strategy.plan(run.state, round))
        if forms_head(run.job, round):
            request = replace(request, kind=STATISTICS, tensors={})
        enough = len(turnout.names) >= needed or not cohort
        asked = turnout.names if enough else []
        screened = collect(run, request, asked, attempt)
        run.bytes_down += len(cohort) * down
        run.bytes_up += screened.usable * up
        for name, reason in screened.set_aside.items() if not hides_cohorts(run.job) else ():
            logger.warning("round %d: set aside %s: %s", round, name, reason)
        if screened.usable >= needed or not cohort:
            return screened, turnout.logged(before)
        before += turnout.seconds or 0.0
        logger.warning(
            "round %d abandoned: %d of %d usable updates, needed %d (attempt %d of %d)",
            round, screened.usable if enough else len(turnout.names), goal, needed, attempt, ATTEMPTS,
        )  # fmt: skip
    raise InconsistentUpdates(_below_quorum(run, screened, turnout, goal, needed))


def _below_quorum(run: Run, screened: Screened, turnout: Turnout, goal: int, needed: int) -> str:
    reasons = [f"{name}: {why}" for name, why in list(screened.set_aside.items())[:3]]
    usable = screened.usable
    if turnout.seconds is not None and len(turnout.names) < needed:
        reasons = [f"{turnout.unavailable} clients not available, {turnout.late} late"]
        usable = len(turnout.names)
    return (
        f"round {run.round + 1}: {usable} of {goal} usable updates, needed {needed} ({'; '.join(reasons)})"
        + ("; go on after the last whole round with --resume" if run.round else "")
    )


def collect(run: Run, request: Request, asked: Sequence[str], attempt: int) -> Screened:
    """What the asked clients send, screened; stacked updates all at once, secure sums as one update."""
    timeout = run.job.federation.round_timeout
    if sums_securely(run.job):
        base = replace(request, plan={**request.plan, "attempt": float(attempt)})
        return SecureRound(
            run.job, base, asked, run.carrier.masks,
            lambda stage, names: list(run.carrier.exchange(stage, names, timeout)),
        ).screened()  # fmt: skip
    sent = run.carrier.exchange(request, asked, timeout)
    if request.kind == STATISTICS:
        return screen_statistics(sent, asked, run.job, run.tensors)
    replies = decompressed(sent, run.job, run.tensors)
    # What examples are promised is in the noise of an update already: its values may be looked at.
    blind = "client" in run.job.privacy.units
    if isinstance(replies, StackedUpdates):
        return screen_stack(replies, asked, run.tensors, request.round, blind=blind)
    return screen(replies, asked, run.tensors, request.round, blind=blind)


def measure(run: Run) -> dict[str, float]:
    """Metrics of the global model: on the server's test set, or, without one, over all clients.

    Clients that are promised privacy measure nothing.
    """
    if run.test is not None and run.whole is not None:
        return run.learner.compute(run.learner.evaluate(run.whole, run.test))
    return {} if run.is_private else validated(run)


def validated(run: Run) -> dict[str, float]:
    """Metrics of the global model over all clients' validation splits; nothing where there are none."""
    measurements = measure_clients(run)
    states = [m.states for m in measurements if m.num_examples]
    return run.learner.compute(added(states)) if states else {}


def measure_clients(run: Run, **plan: float) -> list[Measurement]:
    """The model on every panel member's validation split, by client name; nothing under privacy.

    It is the one that each client would use, unless the `plan` says otherwise.
    """
    if run.is_private:
        return []
    panel = panel_of(run)
    request = _request(run, "evaluate", run.round, plan)
    replies = run.carrier.exchange(request, panel, run.job.federation.round_timeout)
    run.bytes_down += len(panel) * size_of(run.tensors)
    asked = set(panel)
    measurements = []
    for reply in replies:
        match reply:
            case Measurement() if reply.client in asked:
                measurements.append(reply)
            case Failure():
                logger.warning("evaluation: set aside %s: %s", reply.client, reply.reason)
    return sorted(measurements, key=lambda m: m.client)


def panel_of(run: Run) -> list[str]:
    """The clients that measure the model, the same in every round: all, or `evaluate.clients` of them."""
    return some(run.population, run.job.evaluate.clients, stream(run.job.seed, "panel"))


def checkpoint_of(run: Run) -> Checkpoint:
    """What a run killed after this round needs to go on."""
    return Checkpoint(
        round=run.round,
        job_hash=run.job.hash,
        tensors=run.tensors,
        state=run.state | tuning_schedule.state_of(run),
        bytes_up=run.bytes_up,
        bytes_down=run.bytes_down,
        facts=run.learner.facts,
    )


def _request(run: Run, kind: str, round: int, plan: Any) -> Request:
    return Request(
        kind=kind,
        job=run.learner.job.canonical,
        job_hash=run.learner.job.hash,
        round=round,
        facts=run.learner.facts,
        tensors=run.tensors,
        plan=dict(plan),
        run=run_key(run.job, run.directory.path),
    )


def _log_line(
    run: Run,
    cohort: Sequence[str],
    screened: Screened,
    metrics: dict[str, float],
    seconds: dict[str, Any],
) -> dict[str, Any]:
    states = stacked_states(screened.updates) if screened.updates else {}
    count = float(states["train_loss.count"].sum()) if states else 0.0
    line = {
        "round": run.round,
        "cohort": list(cohort),
        "loss": float(states["train_loss.sum"].sum()) / count if count and not run.is_private else None,
        "metrics": metrics,
        **seconds,
        "trained": screened.usable,
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "set_aside": screened.set_aside,
        "model_sha256": tensors_sha256(run.tensors),
    }
    if run.job.tune.then:
        line["tuning"] = run.learner.job.tune.words
    if CHARGED_ROUNDS in states:
        line["charged_rounds"] = max(int(states[CHARGED_ROUNDS].max()), charged_rounds(run))
    if hides_cohorts(run.job):
        line |= _as_expected(run)
    return line


def charged_rounds(run: Run) -> int:
    """The most rounds that any client's ledger holds of this run, as far as clients have said."""
    return int(run.log[-1].get("charged_rounds", 0)) if run.log else 0


def _as_expected(run: Run) -> dict[str, Any]:
    """What stands in a line for who took part, where that is secret: what is public anyway."""
    expected = expected_cohort(run.job)
    up, down = run.upload, size_of(run.tensors)
    traffic = {
        "bytes_up": round(expected * up) * run.round,
        "bytes_down": round(expected * down) * run.round,
    }
    return {"cohort": [], "trained": round(expected), "set_aside": {}, **traffic}
