"""How a run starts, anew or from a checkpoint, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atoll.data.diagnostics import Counts
from atoll.errors import ConfigError
from atoll.job.closed_form import is_closed_form_round
from atoll.job.federation import is_asynchronous
from atoll.job.job import Job
from atoll.learning.compatibility import required_info
from atoll.learning.learner import Learner
from atoll.learning.lora_base import merging_lora
from atoll.protocol.tensors import Tensors
from atoll.server.contributions.measured import check_can_measure
from atoll.server.events import ClientsFound, EventCallback, RunResumed
from atoll.server.roster import ClientRoster
from atoll.server.rounds import tuning_schedule
from atoll.server.rounds.aggregation import (
    ClosedFormRound,
    model_transforms,
    synchronous_round,
    weight_transforms,
)
from atoll.server.rounds.asynchronous.flights import Flights
from atoll.server.rounds.asynchronous.grouped_round import grouped_round
from atoll.server.rounds.asynchronous.round import asynchronous_round
from atoll.server.rounds.central_dp import CentralDp, NoProtection
from atoll.server.rounds.compact_log import CompactLog
from atoll.server.rounds.participation import AvailabilityModel, always_available
from atoll.server.rounds.run_state import (
    RoundKind,
    Run,
    RunSetup,
    RunState,
    SelectionRule,
    TestSet,
    UpdateTransform,
)
from atoll.server.run.checkpoint import Checkpoint, CheckpointManager
from atoll.server.run.directory import RunDirectory
from atoll.server.selection.rules import selection_from_checkpoint, selection_rule, selection_to_checkpoint
from atoll.server.transport import SharesLearner, Transport
from atoll.strategies import Strategy, build_strategy
from atoll.strategies.options import clusters_of, fedcompass_options
from atoll.strategies.personal.ifca import stacked_models
from atoll.tasks import task_named


def start_or_resume(
    job: Job,
    carrier: Transport,
    directory: RunDirectory,
    test_set: TestSet,
    on_event: EventCallback,
    *,
    resume: bool,
    clock: AvailabilityModel = always_available,
    protection: CentralDp | NoProtection | None = None,
    strategy: Strategy | None = None,
    counts: Sequence[Counts] = (),
) -> Run:
    """Discover the clients, merge their data info, and return a run at round 0 or at the last checkpoint.

    A `strategy` object is used instead of the one that the job names. `counts` say how much of a simulation's
    source is used.

    Raises:
        ConfigError, WeightsError, DataError: the job cannot run here, or with these clients.
    """
    strategy_name = job.strategy.name if strategy is None else type(strategy).__name__
    strategy = strategy or build_strategy(job.strategy, job.federation, job.train, job.seed)
    protection = protection or NoProtection()
    roster = carrier.discover_clients(job)
    roster.check(job)
    learner = learner_of(job, carrier, roster)
    torch.set_num_threads(job.train.threads)
    initial = learner.initial()
    base, strategy = strategy, merging_lora(strategy, learner)
    shared = first_model(learner, initial)
    on_event(ClientsFound(roster, learner.backbone, learner.task.inputs_description))
    rule = selection_rule(job, roster)
    flights = Flights()
    later_rounds = later_round_kind(job, carrier, base, clock)
    if is_asynchronous(job):
        clock = flights.timed if job.federation.devices is not None else always_available
    test = test_set(learner)
    setup = RunSetup(
        job, carrier, directory, strategy, roster.names, test, on_event, clock, protection,
        first_round=ClosedFormRound() if is_closed_form_round(job, 1) else later_rounds,
        later_rounds=later_rounds,
        update_transforms=update_transforms_of(job, rule, protection),
        model_transforms=model_transforms(job),
        checkpoints=CheckpointManager(directory.checkpoints, loses_no_round(job), directory.log),
        strategy_name=strategy_name,
        used_data=roster.used_data(job, counts),
        remarks=roster.remarks,
        selection=rule,
        samples_before=() if test is None else learner.samples(initial, test),
    )  # fmt: skip
    check_can_measure(setup)
    stopping = tuning_schedule.stopping_of(job, 0, learner)
    first = tuning_schedule.needed_by_baselines(job, initial)
    run = Run(setup, RunState(learner, first, shared, strategy.begin(shared), stopping, flights))
    if resume:
        _resume(run)
    return run


def first_model(learner: Learner, initial: Tensors) -> Tensors:
    """The global model before the first round: all tensors that clients don't keep, or each cluster's model.

    The cluster models differ in their heads; the first one's head is the one that a job without clusters has.
    """
    clusters = clusters_of(learner.job)
    if not clusters:
        return {name: t for name, t in initial.items() if name not in learner.client_tensors}
    others = (learner.with_another_head(initial, number) for number in range(1, clusters))
    return stacked_models([initial, *others])


def learner_of(job: Job, carrier: Transport, roster: ClientRoster) -> Learner:
    """The learner of the run's first stage; clients in this process share it."""
    task = task_named(job.task.name)
    learner = Learner.of(job.stages[0], task, task.merge_info(roster.data_info))
    learner.data_info = learner.data_info | required_info(learner)
    if isinstance(carrier, SharesLearner):
        carrier.share(learner)
    return learner


def later_round_kind(job: Job, carrier: Transport, strategy: Strategy, clock: AvailabilityModel) -> RoundKind:
    """The kind of all rounds, except for a first round in closed form."""
    options = fedcompass_options(job)
    if options is not None:
        return grouped_round(job, carrier, strategy, clock, options)
    if is_asynchronous(job):
        return asynchronous_round(job, carrier, strategy, clock)
    return synchronous_round(job)


def update_transforms_of(
    job: Job, rule: SelectionRule | None, protection: CentralDp | NoProtection
) -> Sequence[UpdateTransform]:
    """The transforms of a round's updates: first the weights of selection or job, then noise."""
    chosen = () if rule is None else rule.update_transforms
    return (*chosen, *weight_transforms(job), *protection.update_transforms)


def loses_no_round(job: Job) -> bool:
    """Whether each round must be on disk before the next one begins.

    It must where clients keep state of few rounds, and where a lost private round would be charged again.
    """
    return job.has_client_state or (bool(job.privacy.units) and not job.privacy.seeded_noise)


def checkpoint_of(run: Run) -> Checkpoint:
    """The checkpoint of the run's last round, from which it can be resumed."""
    state = run.state
    return Checkpoint(
        round=state.round,
        job_hash=run.setup.job.hash,
        tensors=state.tensors,
        state=state.strategy_state
        | tuning_schedule.state_of(run)
        | run.setup.protection.state
        | state.flights.saved()
        | selection_to_checkpoint(state.selection),
        bytes_up=state.bytes_up,
        bytes_down=state.bytes_down,
        data_info=state.learner.data_info,
    )


def _resume(run: Run) -> None:
    """Go on from the last checkpoint, or begin with an empty log where there is none."""
    directory = run.setup.directory
    checkpoint = directory.latest_checkpoint(run.setup.job.hash)
    if checkpoint is None:
        directory.truncate_log(0)
    else:
        _continue_from(run, checkpoint)


def _continue_from(run: Run, checkpoint: Checkpoint) -> None:
    state, data_info = run.state, run.state.learner.data_info
    if checkpoint.data_info != data_info:
        changed = sorted(
            k for k in {*checkpoint.data_info, *data_info} if checkpoint.data_info.get(k) != data_info.get(k)
        )
        raise ConfigError(f"cannot resume: changed since the checkpoint: {', '.join(changed)}")
    run.setup.directory.check_same_data()
    state.round, state.tensors = checkpoint.round, checkpoint.tensors
    state.selection, others = selection_from_checkpoint(checkpoint.state)
    rest = state.flights.resume(run.setup.protection.resume(others))
    state.strategy_state = tuning_schedule.resume(run, rest)
    state.bytes_up, state.bytes_down = checkpoint.bytes_up, checkpoint.bytes_down
    state.log = CompactLog.of(run.setup.directory.truncate_log(checkpoint.round))
    run.setup.on_event(RunResumed(state.round))
