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
from atoll.server.events import EventCallback
from atoll.server.rounds.asynchronous.flights import Flights
from atoll.server.rounds.central_dp import CentralDp, NoProtection, run_key
from atoll.server.rounds.compact_log import CompactLog
from atoll.server.rounds.early_stopping import StoppingRule
from atoll.server.rounds.participation import AvailabilityModel
from atoll.server.rounds.validation import ValidatedUpdates
from atoll.server.run.checkpoint import CheckpointManager
from atoll.server.run.directory import RunDirectory
from atoll.server.transport import Transport
from atoll.strategies.strategy import State, Strategy
from atoll.tasks.task import Sample

TestSet = Callable[[Learner], Shard | None]
"""A function that returns the server's test set, given the learner; None where the server has none."""


class RoundKind(Protocol):
    """One kind of round: which clients it asks for what, and how their answers become the next model."""

    def sample(self, run: Run, round: int) -> list[str]:
        """The names, sorted, of the clients that are asked in this round; `round` counts from 1."""
        ...

    def bytes_per_client(self, run: Run) -> tuple[int, int]:
        """(bytes to each client, bytes from each client) of one attempt at a round."""
        ...

    def gather_updates(self, run: Run, names: Sequence[str], round: int, attempt: int) -> ValidatedUpdates:
        """The validated updates of the named clients; `attempt` counts the round's tries from 1.

        Raises:
            JobError: the updates cannot be combined, as when a secure sum cannot be opened.
        """
        ...

    def merge(self, run: Run, gathered: ValidatedUpdates, round: int) -> None:
        """Compute the next global model from the updates, and store it in `run.state`."""
        ...

    def close(self) -> None:
        """Release what the rounds hold, such as pending requests, when the run ends."""
        ...


class ReplyTransform(Protocol):
    """Transforms the replies of one attempt before they are validated, as decompression does."""

    def __call__(self, replies: Iterable[Reply], model: Tensors) -> Iterable[Reply]:
        """The transformed replies, as they arrive; `model` holds the tensors that clients were sent."""
        ...


class UpdateTransform(Protocol):
    """Transforms a round's validated updates before the strategy merges them, as clipping with noise does."""

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        """(the transformed updates, entries to add to the strategy's state for the next round).

        `model` is what the clients started from, `state` the strategy's state before the round.
        """
        ...


class ModelTransform(Protocol):
    """Transforms each merged model before it becomes the next global one: it may zero pruned weights, say."""

    def __call__(self, model: Tensors, learner: Learner) -> Tensors:
        """The tensors to use as the next global model; same names, shapes and dtypes as `model`."""
        ...


class SelectionRule(Protocol):
    """A rule that samples a round's clients with unequal probabilities.

    Its methods are pure functions of what the server receives, so that all engines choose the same clients.
    The state is a flat dict of the rule's own, saved with every checkpoint.
    """

    def cohort(self, state: State, round: int) -> list[str]:
        """The names of the round's clients, sorted; `round` counts from 1."""
        ...

    def after_round(self, state: State, updates: Sequence[Update], round: int) -> State:
        """The state after a round whose validated updates are `updates`."""
        ...

    @property
    def update_transforms(self) -> Sequence[UpdateTransform]:
        """Transforms that correct the merge for unequal sampling probabilities, in the order of use."""
        ...


@dataclass(frozen=True)
class RunSetup:
    """Everything about a run that is fixed when it opens.

    The first round may be of another kind than the later ones. Transforms are listed in the order in which
    they are applied.
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
    """The strategy's name in the job, or the class name of a strategy object passed to `simulate`."""
    used_data: dict[str, Any] | None = None
    """How much of the data is used, in total and by client; None where that is private."""
    remarks: Sequence[str] = ()
    """Warnings about the data that clients report."""
    selection: SelectionRule | None = None
    """The rule that samples a round's clients; None where all have the same probability."""
    samples_before: Sequence[Sample] = ()
    """Texts that the model writes before training, for prompts of the server's test set; of some tasks."""

    def kind_of_round(self, round: int) -> RoundKind:
        """The kind of this round; `round` counts from 1."""
        return self.first_round if round == 1 else self.later_rounds


@dataclass
class RunState:
    """What a run's rounds change; `round` is the last complete round, 0 before the first."""

    learner: Learner
    initial_model: Tensors
    """The model before training, for baselines; empty where the job asks for none."""
    tensors: Tensors
    strategy_state: State
    stopping: StoppingRule
    flights: Flights = field(default_factory=Flights)
    """Clients that train across rounds, in asynchronous jobs; empty where rounds wait for all clients."""
    round: int = 0
    stage: int = 0
    stage_start_round: int = 0
    log: CompactLog = field(default_factory=CompactLog)
    bytes_down: int = 0
    bytes_up: int = 0
    ended_early: str = ""
    selection: State = field(default_factory=dict)
    """The state of the rule that samples clients."""


@dataclass(frozen=True)
class Run:
    """One run in progress: its fixed setup and its changing state."""

    setup: RunSetup
    state: RunState

    @property
    def is_private(self) -> bool:
        """Whether the job promises privacy; what clients hold is then never published without protection."""
        return bool(self.setup.job.privacy.units)

    @property
    def full_model(self) -> Tensors | None:
        """The complete global model; where clients keep their norm layers, with these layers' initial values.

        None where clients keep their heads, or each cluster of clients has its own model.
        """
        if self.setup.job.personal.keep == "head" or self.setup.job.strategy.makes_clusters:
            return None
        return {**self.state.learner.client_tensors, **self.state.tensors}

    def trained_in_round(self, round: int) -> Tensors:
        """The tensors of the model that clients train and send in this round, by name."""
        return self.state.learner.trained_in_round(self.state.tensors, round)

    def update_bytes(self, round: int) -> int:
        """The size in bytes of one client's update in this round, compressed as it travels."""
        return upload_size(self.setup.job, self.trained_in_round(round))

    def request_origin(self, round: int) -> RequestOrigin:
        """The fields that all requests of this round share: job, round, data info and run."""
        job = self.state.learner.job
        return RequestOrigin(
            job=job.canonical,
            job_hash=job.hash,
            round=round,
            data_info=self.state.learner.data_info,
            run=run_key(self.setup.job, self.setup.directory.path),
        )

    def send(self, request: Request, names: Sequence[str]) -> Iterable[Reply]:
        """The named clients' replies as they arrive until the job's deadline; large ones lie on disk."""
        timeout = self.setup.job.federation.round_timeout
        return self.on_disk(self.setup.carrier.send_and_receive(request, names, timeout))

    def on_disk(self, replies: Iterable[Reply]) -> Iterable[Reply]:
        """The replies as they arrive, with the tensors of large ones in files in the run's directory."""
        return all_kept_on_disk(replies, self.setup.directory.updates)

    def reply_on_disk(self, reply: AnyReply) -> AnyReply:
        """The reply; if it is large, its tensors are in files in the run's directory."""
        return kept_on_disk(reply, self.setup.directory.updates)
