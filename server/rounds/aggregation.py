"""From a cohort's names to the next global model: three kinds of rounds, and what all of them share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from atoll.errors import InconsistentUpdates
from atoll.job.federation import FederationSection
from atoll.job.job import Job
from atoll.job.privacy import unless_secret, uses_secure_aggregation
from atoll.learning.learner import Learner
from atoll.learning.trainable import without_pruned
from atoll.protocol.messages import Update
from atoll.protocol.requests import StatisticsRequest, TrainRequest
from atoll.protocol.stacked_updates import weighing
from atoll.protocol.tensors import Tensors, all_aligned, size_of
from atoll.report.run_result import RoundExtras
from atoll.server.rounds.closed_form import form_head, statistics_size, validate_statistics
from atoll.server.rounds.cohort import round_up, sample
from atoll.server.rounds.decompression import Decompression
from atoll.server.rounds.participation import CohortRequest, Participation, elapsed
from atoll.server.rounds.run_state import ModelTransform, ReplyTransform, RoundKind, Run, UpdateTransform
from atoll.server.rounds.secure_aggregation import SecureRound
from atoll.server.rounds.validation import ValidatedUpdates, Validation
from atoll.server.run.forget import keep_sums
from atoll.strategies.mean import example_counts
from atoll.strategies.random_features import with_last_layer
from atoll.strategies.strategy import State, tensors_for_clients

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Times a round below its quorum is tried before the run fails."""

TOO_FEW = "too few of those who were drawn sent usable updates"
"""The message for a cohort below the quorum whose members are secret, so that no numbers are published."""


class SampledRound:
    """The common part of rounds that sample a new cohort and wait for all of its replies."""

    def sample(self, run: Run, round: int) -> list[str]:
        if run.setup.selection is not None:
            return run.setup.selection.cohort(run.state.selection, round)
        uniforms = run.setup.protection.uniforms(round)
        return sample(run.setup.population, run.setup.job, round, uniforms)

    def close(self) -> None:
        """Nothing to release: every round has waited for all of its clients."""


class TrainingRound(SampledRound):
    """The common part of rounds in which clients train: each gets the model, and their updates are merged."""

    def bytes_per_client(self, run: Run) -> tuple[int, int]:
        beside = size_of(tensors_for_clients(run.setup.strategy, run.state.strategy_state))
        return size_of(run.state.tensors) + beside, run.update_bytes(run.state.round + 1) + beside

    def merge(self, run: Run, gathered: ValidatedUpdates, round: int) -> None:
        merge_updates(run, gathered.updates, round)


@dataclass(frozen=True)
class PlainRound(TrainingRound):
    """A round in which the server receives each client's update: it transforms all in order and validates."""

    reply_transforms: Sequence[ReplyTransform]
    validate: Validation

    def gather_updates(self, run: Run, names: Sequence[str], round: int, attempt: int) -> ValidatedUpdates:
        request, model = train_request(run, round), run.trained_in_round(round)
        replies = run.send(request, names)
        for transform in self.reply_transforms:
            replies = run.on_disk(transform(replies, model))
        return self.validate(replies, names, model, round, request.strategy_tensors)


@dataclass(frozen=True)
class SecureSumRound(TrainingRound):
    """A round in which the server learns only the sum of the updates, which it merges as a single update."""

    def gather_updates(self, run: Run, names: Sequence[str], round: int, attempt: int) -> ValidatedUpdates:
        return SecureRound(
            run.setup.job, train_request(run, round), attempt, names, run.setup.carrier.uses_masking,
            lambda stage, clients: list(run.send(stage, clients)), run.setup.carrier.roster,
            summed=run.trained_in_round(round),
        ).screened()  # fmt: skip


@dataclass(frozen=True)
class ClosedFormRound(SampledRound):
    """A round without training: the server sums statistics of all clients and solves for the head."""

    def bytes_per_client(self, run: Run) -> tuple[int, int]:
        return 0, statistics_size(run.setup.job, run.state.tensors)

    def gather_updates(self, run: Run, names: Sequence[str], round: int, attempt: int) -> ValidatedUpdates:
        request = StatisticsRequest(**run.request_origin(round))
        return validate_statistics(run.send(request, names), names, run.setup.job, run.state.tensors)

    def merge(self, run: Run, gathered: ValidatedUpdates, round: int) -> None:
        setup, state = run.setup, run.state
        if setup.job.tune.keep_sums:
            keep_sums(setup.directory.path, gathered.by_client)
        formed = form_head(setup.job, gathered, setup.protection, round, state.tensors)
        state.tensors = state.tensors if formed is None else with_last_layer(state.tensors, formed)


def synchronous_round(job: Job) -> RoundKind:
    """The kind of the job's training rounds that wait for all clients: a secure sum or plain updates."""
    if uses_secure_aggregation(job):
        return SecureSumRound()
    return PlainRound(reply_transforms(job), Validation.of(job))


def reply_transforms(job: Job) -> Sequence[ReplyTransform]:
    """The job's transforms of replies in plain rounds, in the order of use."""
    return () if job.federation.compression is None else (Decompression(job),)


def request_updates(run: Run, cohort: Sequence[str], round: int) -> tuple[ValidatedUpdates, RoundExtras]:
    """(validated updates of the first attempt that reaches the quorum, the simulated time for the log).

    Raises:
        InconsistentUpdates: every one of `MAX_ATTEMPTS` attempts brought fewer than the quorum, or so many
            clients diverged that another attempt could not reach it.
    """
    kind, federation, state = run.setup.kind_of_round(round), run.setup.job.federation, run.state
    goal = min(federation.cohort or len(cohort), len(cohort))
    needed = max(1, round_up(federation.quorum * goal))
    down, up = kind.bytes_per_client(run)
    before = elapsed(state.log)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        turnout = run.setup.clock(CohortRequest(round, attempt, cohort, goal, down, up))
        enough = len(turnout.names) >= needed or not cohort
        gathered = kind.gather_updates(run, turnout.names if enough else [], round, attempt)
        state.bytes_down += unless_secret(run.setup.job, len(cohort) * down, 0)
        state.bytes_up += unless_secret(run.setup.job, gathered.num_valid * up, 0)
        _warn_of_set_aside(run, gathered, round)
        if gathered.num_valid >= needed or not cohort:
            return gathered, turnout.logged(before)
        before += turnout.seconds or 0.0
        usable = gathered.num_valid if enough else len(turnout.names)
        message = unless_secret(run.setup.job, _counts(usable, goal, needed), TOO_FEW)
        logger.warning("round %d abandoned: %s (attempt %d of %d)", round, message, attempt, MAX_ATTEMPTS)
        if enough and len(turnout.names) - gathered.num_diverged < needed:
            break  # the same clients would diverge again, from the same model and seed
    raise InconsistentUpdates(_below_quorum(run, gathered, turnout, goal, needed))


def train_request(run: Run, round: int) -> TrainRequest:
    """The request to train in this round: the model, and the numbers and tensors of the strategy."""
    strategy, state = run.setup.strategy, run.state.strategy_state
    return TrainRequest(
        **run.request_origin(round), tensors=run.state.tensors, plan=dict(strategy.plan(state, round)),
        strategy_tensors=tensors_for_clients(strategy, state),
    )  # fmt: skip


def merge_updates(run: Run, updates: Sequence[Update], round: int) -> None:
    """Merge validated updates into the next global model and strategy state, and store both in the run."""
    run.state.tensors, run.state.strategy_state = merged(run, updates, round)


def merged(run: Run, updates: Sequence[Update], round: int) -> tuple[Tensors, State]:
    """(the next global model, the next strategy state) from validated updates; the run itself is unchanged.

    Update transforms come first, then the strategy's merge, then model transforms, each list in its order.
    What a strategy made of another library's arrays, or of parts of its own, is copied to where it would lie
    after a checkpoint was read.
    """
    setup, state = run.setup, run.state
    added_state: State = {}
    trained = run.trained_in_round(round)
    for transform_updates in setup.update_transforms:
        updates, more_state = transform_updates(updates, round, trained, state.strategy_state)
        added_state |= more_state
    model, strategy_state = state.tensors, state.strategy_state
    if updates:
        model, strategy_state = setup.strategy.merge(model, updates, strategy_state)
    for transform_model in setup.model_transforms:
        model = transform_model(model, state.learner)
    entries = {**strategy_state, **added_state}
    tensors = all_aligned({name: entry for name, entry in entries.items() if isinstance(entry, torch.Tensor)})
    return all_aligned(model), entries | tensors


@dataclass(frozen=True)
class MergeWeights:
    """An update transform that gives updates the weights of the job's `federation.weights`."""

    federation: FederationSection

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        """The same updates with their weights in `num_examples`, and nothing for the strategy's state."""
        weights = [self.federation.merge_weight(count) for count in example_counts(updates)]
        return weighing(updates, weights), {}


def weight_transforms(job: Job) -> Sequence[UpdateTransform]:
    """The transforms that set the job's merge weights; none under a secure sum: clients then apply them."""
    chosen = job.federation.weights is not None and not uses_secure_aggregation(job)
    return (MergeWeights(job.federation),) if chosen else ()


def zero_pruned(model: Tensors, learner: Learner) -> Tensors:
    """The model with its pruned weights set to zero, which noise or merging may have made nonzero."""
    return model if learner.uses_features else without_pruned(learner.model, model)


def model_transforms(job: Job) -> Sequence[ModelTransform]:
    """The job's transforms of every merged model, in the order of use."""
    return () if job.backbone.prune is None else (zero_pruned,)


def _warn_of_set_aside(run: Run, gathered: ValidatedUpdates, round: int) -> None:
    for name, reason in unless_secret(run.setup.job, gathered.set_aside, {}).items():
        logger.warning("round %d: set aside %s: %s", round, name, reason)


def _below_quorum(
    run: Run, gathered: ValidatedUpdates, turnout: Participation, goal: int, needed: int
) -> str:
    reasons = [f"{name}: {why}" for name, why in list(gathered.set_aside.items())[:3]]
    usable = gathered.num_valid
    if turnout.seconds is not None and len(turnout.names) < needed:
        reasons = [f"{turnout.unavailable} clients not available, {turnout.late} late"]
        usable = len(turnout.names)
    message = f"{_counts(usable, goal, needed)} ({'; '.join(reasons)})"
    if gathered.num_diverged:
        message += "; training diverged: a smaller train.lr may help"
    return f"round {run.state.round + 1}: {unless_secret(run.setup.job, message, TOO_FEW)}" + (
        "; go on after the last whole round with --resume" if run.state.round else ""
    )


def _counts(usable: int, goal: int, needed: int) -> str:
    return f"{usable} of {goal} usable updates, needed {needed}"
