"""What a run consists of: `RunSetup` is fixed for all of its rounds, `RunState` is what they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.compression import upload_size
from atoll.protocol.messages import Reply, Update
from atoll.protocol.requests import Request, RequestOrigin
from atoll.protocol.tensors import Tensors
from atoll.protocol.updates_on_disk import AnyReply, all_kept_on_disk, kept_on_disk
from atoll.report.run_result import RoundLine
from atoll.server.events import EventCallback
from atoll.server.rounds.asynchronous.flights import Flights
from atoll.server.rounds.central_dp import CentralDp, NoProtection, run_key
from atoll.server.rounds.early_stopping import StoppingRule
from atoll.server.rounds.participation import AvailabilityModel
from atoll.server.rounds.validation import ValidatedUpdates
from atoll.server.run.checkpoint import CheckpointManager
from atoll.server.run.directory import RunDirectory
from atoll.server.transport import Transport
from atoll.strategies.strategy import State, Strategy
from atoll.tasks.task import Sample

TestSet = Callable[[Learner], Shard | None]
"""The server's own test set, once the run's facts are known."""


class RoundKind(Protocol):
    """How a round asks its clients for work, and what becomes of their answers."""

    def sample(self, run: Run, round: int) -> list[str]:
        """The clients whose updates the round merges, sorted."""
        ...

    def bytes_per_client(self, run: Run) -> tuple[int, int]:
        """Bytes that travel (to, from) each client in one attempt."""
        ...

    def gather_updates(self, run: Run, names: Sequence[str], round: int, attempt: int) -> ValidatedUpdates:
        """The validated updates of the named clients; `attempt` counts from 1 within the round."""
        ...

    def merge(self, run: Run, gathered: ValidatedUpdates, round: int) -> None:
        """Put the next global model into the run's state."""
        ...

    def close(self) -> None:
        """The run has ended: wait for nobody any more."""
        ...


class ReplyTransform(Protocol):
    """What happens to the replies of one attempt before they are validated."""

    def __call__(self, replies: Iterable[Reply], model: Tensors) -> Iterable[Reply]:
        """The replies in their place, as they come; `model` is the one that was sent."""
        ...


class UpdateTransform(Protocol):
    """What happens to a round's validated updates before the strategy sees them."""

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        """(the updates in their place, what the strategy's state keeps for the next round)."""
        ...


class ModelTransform(Protocol):
    """What happens to a model that has just been merged."""

    def __call__(self, model: Tensors, learner: Learner) -> Tensors:
        """The tensors in its place."""
        ...


class SelectionRule(Protocol):
    """How a round's clients are chosen where chances aren't even.

    Pure functions of what every engine's server receives; the state is the rule's own and survives a crash.
    """

    def cohort(self, state: State, round: int) -> list[str]:
        """The names of the round's clients, sorted."""
        ...

    def after_round(self, state: State, updates: Sequence[Update], round: int) -> State:
        """The state after a round with those validated updates."""
        ...

    @property
    def update_transforms(self) -> Sequence[UpdateTransform]:
        """What happens to a round's updates before they are merged, so that the merge fits the choice."""
        ...


@dataclass(frozen=True)
class RunSetup:
    """What is fixed when a run opens.

    The first round may be of another kind than the later ones. Transforms are in the order in which they
    are applied.
    """

    job: Job
    carrier: Transport
    directory: RunDirectory
    strategy: Strategy
    population: Sequence[str]
    test: Shard | None
    on_event: EventCallback
    clock: AvailabilityModel
    protection: CentralDp | NoProtection
    first_round: RoundKind
    later_rounds: RoundKind
    update_transforms: Sequence[UpdateTransform]
    model_transforms: Sequence[ModelTransform]
    checkpoints: CheckpointManager
    strategy_name: str
    """The job's name for it, or the class of an object that was handed in instead."""
    used_data: dict[str, Any] | None = None
    """How much of the data is used, in all and by client, and why the rest is left out; None: not told."""
    remarks: Sequence[str] = ()
    """What looks odd in what clients told of their data."""
    selection: SelectionRule | None = None
    """How a round's clients are chosen; None where chances are even."""
    samples_before: Sequence[Sample] = ()
    """What the model writes before training for a few prompts of the server's test set, of some tasks."""

    def kind_of_round(self, round: int) -> RoundKind:
        """How the updates of this round are gathered."""
        return self.first_round if round == 1 else self.later_rounds


@dataclass
class RunState:
    """Where a run has got to: `round` is the last whole one, 0 before the first."""

    learner: Learner
    initial_model: Tensors
    """As before training, for baselines; empty where the job asks for none."""
    tensors: Tensors
    strategy_state: State
    stopping: StoppingRule
    flights: Flights = field(default_factory=Flights)
    """Clients that are at work from round to round; nobody, where rounds wait for all of theirs."""
    round: int = 0
    stage: int = 0
    stage_start_round: int = 0
    log: list[RoundLine] = field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    ended_early: str = ""
    selection: State = field(default_factory=dict)
    """What the rule by which clients are chosen keeps."""


@dataclass(frozen=True)
class Run:
    """One run in progress."""

    setup: RunSetup
    state: RunState

    @property
    def is_private(self) -> bool:
        """Whether privacy is promised; what clients hold is then never published in the clear."""
        return bool(self.setup.job.privacy.units)

    @property
    def full_model(self) -> Tensors | None:
        """The model that all share, where norms are kept with the first ones.

        None where heads are kept, or clusters of clients have models of their own.
        """
        if self.setup.job.personal.keep == "head" or self.setup.job.strategy.makes_clusters:
            return None
        return {**self.state.learner.client_tensors, **self.state.tensors}

    def trained_in_round(self, round: int) -> Tensors:
        """Those of the model's tensors that clients train and send in a round."""
        return self.state.learner.trained_in_round(self.state.tensors, round)

    def update_bytes(self, round: int) -> int:
        """Bytes of one client's update of a round as it travels."""
        return upload_size(self.setup.job, self.trained_in_round(round))

    def request_origin(self, round: int) -> RequestOrigin:
        """What every request of this round says of the job and the run."""
        job = self.state.learner.job
        return RequestOrigin(
            job=job.canonical,
            job_hash=job.hash,
            round=round,
            data_info=self.state.learner.data_info,
            run=run_key(self.setup.job, self.setup.directory.path),
        )

    def send(self, request: Request, names: Sequence[str]) -> Iterable[Reply]:
        """The named clients' replies as they come, until the job's deadline; large ones are on the disk."""
        timeout = self.setup.job.federation.round_timeout
        return self.on_disk(self.setup.carrier.send_and_receive(request, names, timeout))

    def on_disk(self, replies: Iterable[Reply]) -> Iterable[Reply]:
        """The replies as they come, with the large ones in files of the run's directory."""
        return all_kept_on_disk(replies, self.setup.directory.updates)

    def kept(self, reply: AnyReply) -> AnyReply:
        """The reply, in files of the run's directory if it is large."""
        return kept_on_disk(reply, self.setup.directory.updates)
