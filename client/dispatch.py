"""Does the work of each kind of request that a site has accepted, for real and simulated sites alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from atoll.client.dp.adaptive_norms import store_scales, with_stored_scales
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.gradient_sums import head_sums
from atoll.client.dp.secure_aggregation import SecureAggregationSession, contributions, sums
from atoll.client.heads.class_imbalance import loss_by_example
from atoll.client.heads.distillation import head_loss
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.statistics import statistics
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.state.apfl import train_apfl
from atoll.client.state.corrected_training import correcting_client, train_corrected
from atoll.client.state.ditto import train_ditto
from atoll.client.state.error_feedback import compressed
from atoll.client.state.ifca import train_clusters
from atoll.client.state.moon import train_moon
from atoll.client.state.personalization import model_to_evaluate, train_fedper
from atoll.client.state.store import ClientStateStore
from atoll.client.training.local_sgd import train_model
from atoll.client.training.local_steps import with_assigned_steps, with_local_steps
from atoll.client.training.per_fedavg import inner_lr_of
from atoll.client.training.pfedme import MoreauSteps
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.job.train import PLAIN_STEPS
from atoll.learning.learner import Learner
from atoll.privacy.dp_plan import distributed_terms
from atoll.protocol.messages import LOCAL_STEPS, RECEIVED_LOSS, Measurement, Reply, Update
from atoll.protocol.requests import (
    EvaluateRequest,
    MaskedSumRequest,
    Request,
    StatisticsRequest,
    TrainingRequest,
    TrainRequest,
    UnmaskedSumRequest,
)
from atoll.protocol.stacked_updates import with_state
from atoll.protocol.tensors import Tensors
from atoll.strategies.lora.flexlora import starts_by_rank

NOTHING: Mapping[str, Tensors] = {}
"""Tensors by client, where no client has a start or a correction of its own."""

WHOLE = 1 << 30
"""A batch size that makes one batch of a client's whole shard."""


class ClientData(Protocol):
    """The data of the clients that a request is for."""

    @property
    def names(self) -> Sequence[str]:
        """The clients, in the order of their replies."""
        ...

    def train(self, client: str) -> Shard:
        """The shard that the client trains on."""
        ...

    def validation(self, client: str) -> Shard:
        """The shard that the client evaluates models on; it may be empty."""
        ...

    def feature_table(self) -> tuple[FeatureTable, list[ClientRows]]:
        """(features of all these clients' training examples, each client's rows in that table)."""
        ...


HeadTrainer = Callable[[Tensors, FeatureTable, Sequence[ClientRows], HeadTrainingConfig], Iterable[Update]]
"""(shared head, feature table, each client's rows, configuration) to the clients' updates in that order."""

Training = TypeVar("Training", bound=TrainingRequest)

ModelTrainer = Callable[["LocalWork", TrainRequest], Iterable[Update]]
"""Trains whole models of all clients of a request; returns their updates in the order of `data.names`."""


@dataclass(frozen=True)
class LocalWork:
    """All that clients need to work on one request: learner, data, stored state and privacy.

    `private` is set where examples are protected at the client. `charged` has the number of this run's rounds
    in each client's ledger. The engine chooses the trainers: by default heads of all clients are trained
    together and whole models one after the other.
    """

    learner: Learner
    data: ClientData
    memory: ClientStateStore
    secure_session: SecureAggregationSession
    private: DpSgd | None = None
    charged: Mapping[str, int] = field(default_factory=dict)
    train_heads: HeadTrainer = train_heads
    train_models: ModelTrainer | None = None

    def replies(self, request: Request) -> Iterable[Reply]:
        """Each client's reply, in the order of `data.names`.

        Raises:
            TypeError: no work is defined for this kind of request.
        """
        if not self.data.names:
            return ()
        self.learner.begin_round(request.round)
        match request:
            case EvaluateRequest():
                return evaluate(self, request)
            case StatisticsRequest():
                shards = {name: self.data.train(name) for name in self.data.names}
                return statistics(self.learner, request.round, shards, self.private)
            case TrainRequest():
                job, updates = self.learner.job, trained(self, request)
                if LOCAL_STEPS in request.plan:
                    updates = with_local_steps(updates, job.train)
                if job.strategy.sends_losses:
                    losses = received_losses(self, request)
                    updates = with_state(updates, RECEIVED_LOSS, lambda client, _: losses.get(client))
                return compressed(updates, sent_back(self, request), job, self.memory)
            case MaskedSumRequest() | UnmaskedSumRequest():
                job, length_of = self.learner.job, sent_back(self, request)
                return self.secure_session.encode_contributions(
                    job, length_of, summed(self, request), self.charged
                )
        raise TypeError(f"no work of a client: {type(request).__name__}")


def sent_back(work: LocalWork, request: Training) -> Training:
    """The request with only those tensors that clients train and send in its round."""
    return replace(request, tensors=work.learner.trained_in_round(request.tensors, request.round))


def evaluate(work: LocalWork, request: EvaluateRequest) -> Iterator[Measurement]:
    """Each client's measurement of the model on its validation split; empty states where that is empty."""
    for name in work.data.names:
        lessons = partial(work.data.train, name)
        model = model_to_evaluate(work.learner, request, name, work.memory, lessons)
        part = work.data.validation(name)
        states = work.learner.evaluate(model, part) if len(part) else {}
        yield Measurement(name, request.round, len(part), states)


def trained(work: LocalWork, request: TrainRequest) -> Iterable[Update]:
    """The clients' updates; the state that clients keep is stored before their updates are returned."""
    learner, names, keep = work.learner, work.data.names, work.learner.job.personal
    if keep.splits:
        shards = {name: work.data.train(name) for name in names}
        return train_fedper(learner, request, shards, work.memory)
    if learner.job.strategy.makes_clusters:
        return train_clusters(
            learner, request, names, work.data.train,
            lambda one, some: updates_of(replace(work, data=SomeClients(work.data, some)), one),
        )  # fmt: skip
    if learner.job.strategy.keeps_last_model:
        return train_moon(learner, request, names, work.data.train, work.memory)
    if learner.job.strategy.keeps_client_state:
        return corrected(work, request)
    train_own_models(work, request)
    ranks = learner.job.tune.lora_ranks or {}
    job = with_assigned_steps(learner.job, request.plan)
    return updates_of(work, request, starts_by_rank(request.tensors, ranks, names), job)


def train_own_models(work: LocalWork, request: TrainingRequest) -> None:
    """Train the models that clients keep beside the shared one, without noise, since they never leave."""
    if work.learner.job.personal.keep == "mixture":
        alpha = work.learner.job.personal.mixing_weight
        train = partial(updates_of, replace(work, private=None), mixing=alpha)
        method = train_apfl if alpha else train_ditto
        method(work.learner, request, work.data.names, train, work.memory)


@dataclass(frozen=True)
class SomeClients:
    """The data of some of the clients that a request is for."""

    data: ClientData
    names: Sequence[str]

    def train(self, client: str) -> Shard:
        return self.data.train(client)

    def validation(self, client: str) -> Shard:
        return self.data.validation(client)

    def feature_table(self) -> tuple[FeatureTable, list[ClientRows]]:
        examples, rows = self.data.feature_table()
        return examples, [one for one in rows if one.client in self.names]


def corrected(work: LocalWork, request: TrainRequest) -> Iterable[Update]:
    """The updates of strategies that correct gradients by stored state, such as SCAFFOLD.

    For whole networks only one client's state is in memory at a time.
    """
    if not work.learner.trains_on_features:
        alone = (replace(work, data=SomeClients(work.data, [name])) for name in work.data.names)
        return chain.from_iterable(_corrected(one, request) for one in alone)
    return _corrected(work, request)


def _corrected(work: LocalWork, request: TrainRequest) -> Iterable[Update]:
    return train_corrected(
        correcting_client(work.learner.job), request, work.data.names,
        lambda corrections: updates_of(work, request, corrections=corrections),
        lambda: full_gradients(work, request), work.memory,
    )  # fmt: skip


def updates_of(
    work: LocalWork,
    request: TrainingRequest,
    starts: Mapping[str, Tensors] = NOTHING,
    job: Job | None = None,
    corrections: Mapping[str, Tensors] = NOTHING,
    mixing: float = 0.0,
) -> Iterable[Update]:
    """The clients' updates after local training: of heads together, of whole models as the engine does it.

    `job` replaces the learner's job for the training. `starts` and `corrections` hold tensors by client, for
    those that start elsewhere or correct their gradients. A client without usable examples sends an update
    as every other does: of noise alone, or of zeros.
    """
    if work.private is not None and work.private.adaptive is not None:
        adaptive = with_stored_scales(work.private.adaptive, work.data.names, request, work.memory)
        work = replace(work, private=replace(work.private, adaptive=adaptive))
        updates = _updates_of(work, request, starts, job, corrections, mixing)
        return store_scales(updates, request, work.memory)
    return _updates_of(work, request, starts, job, corrections, mixing)


def _updates_of(
    work: LocalWork,
    request: TrainingRequest,
    starts: Mapping[str, Tensors],
    job: Job | None,
    corrections: Mapping[str, Tensors],
    mixing: float,
) -> Iterable[Update]:
    if work.learner.trains_on_features:
        examples, client_rows = work.data.feature_table()
        local = head_training(work, request, job)
        local = replace(local, starts=starts, corrections=corrections, mixing=mixing)
        idle = [] if work.private else [rows.client for rows in client_rows if not len(rows.rows)]
        busy = [rows for rows in client_rows if rows.client not in idle]
        updates = work.train_heads(request.tensors, examples, busy, local) if busy else []
        return chain((unmoved(name, request) for name in idle), updates) if idle else updates
    at_once = work.train_models is not None and work.private is None and not starts
    if at_once and work.train_models is not None and isinstance(request, TrainRequest):
        return work.train_models(work, request)
    return one_by_one(work, request, job or work.learner.job, starts, corrections, mixing)


def unmoved(client: str, request: TrainingRequest) -> Update:
    """The update of a client without examples: zeros."""
    delta = {name: torch.zeros_like(tensor) for name, tensor in request.tensors.items()}
    nothing = torch.zeros((), dtype=torch.float64)
    states = {"train_loss.sum": nothing, "train_loss.count": nothing}
    return Update(client, request.round, delta, num_examples=0, states=states)


def one_by_one(
    work: LocalWork,
    request: TrainingRequest,
    job: Job,
    starts: Mapping[str, Tensors],
    corrections: Mapping[str, Tensors],
    mixing: float,
) -> Iterator[Update]:
    """The updates of whole models, trained one client after the other."""
    learner, private = work.learner, work.private
    for name in work.data.names:
        shard, tensors = work.data.train(name), request.tensors
        if private is None:
            yield train_model(
                learner, tensors, shard, job,
                client=name, round=request.round, plan=request.plan, begin=starts.get(name),
                correction=corrections.get(name), inner_lr=inner_lr_of(job), mixing=mixing,
                moreau=MoreauSteps.of(job),
            )  # fmt: skip
            continue
        from atoll.client.dp.dp_sgd_model import train_privately  # it brings in Opacus, which takes a second

        yield train_privately(
            learner, tensors, shard, private, client=name, round=request.round, plan=request.plan
        )


def full_gradients(work: LocalWork, request: TrainRequest) -> Iterator[Update]:
    """Each client's update after one SGD step of learning rate 1 on all examples: minus its full gradient."""
    learner = work.learner
    job = learner.job
    if learner.trains_on_features:
        examples, client_rows = work.data.feature_table()
        whole = with_one_step(job, parts=1, part=WHOLE)
        busy = [rows for rows in client_rows if len(rows.rows)]
        local = HeadTrainingConfig(whole, head_loss(whole, learner.task.head_loss), request.round)
        yield from work.train_heads(request.tensors, examples, busy, local) if busy else ()
        return
    part = job.train.batch_size // job.train.accumulate
    for name in work.data.names:
        shard = work.data.train(name)
        whole = with_one_step(job, parts=max(1, -(-len(shard) // part)), part=part)
        yield train_model(learner, request.tensors, shard, whole, client=name, round=request.round, plan={})


def received_losses(work: LocalWork, request: TrainRequest) -> dict[str, float]:
    """The mean loss of the received model on each client's training examples, for clients that have any."""
    updates = full_gradients(work, request)
    sums = {u.client: (u.states["train_loss.sum"], u.states["train_loss.count"]) for u in updates}
    return {client: float(summed) / float(count) for client, (summed, count) in sums.items()}


def with_one_step(job: Job, *, parts: int, part: int) -> Job:
    """The job with one local step of plain gradient descent, its batch cut in `parts` of `part` examples."""
    step = {
        "epochs": 1, "steps": None, "lr": 1.0, "momentum": 0.0, "batch_size": parts * part,
        "accumulate": parts,
    }  # fmt: skip
    return job.model_copy(update={"train": job.train.model_copy(update=PLAIN_STEPS | step)})


def summed(work: LocalWork, request: TrainingRequest) -> Iterable[tuple[str, Tensor]]:
    """Each client's contribution to a secure sum: its update, or its clipped gradients."""
    dp_plan, private, learner = distributed_terms(work.learner.job), work.private, work.learner
    train_own_models(work, request)
    if dp_plan is None or dp_plan.unit == "client":
        return contributions(updates_of(work, request), dp_plan, learner.job.federation)
    assert private is not None
    if learner.trains_on_features:
        examples, client_rows = work.data.feature_table()
        loss = loss_by_example(learner.job, learner.task.head_loss)
        return sums(head_sums(request.tensors, examples, client_rows, loss, private))
    from atoll.client.dp.dp_sgd_model import model_sums

    shards = {name: work.data.train(name) for name in work.data.names}
    return sums(model_sums(learner, request.tensors, shards, private, request.round))


def head_training(work: LocalWork, request: TrainingRequest, job: Job | None = None) -> HeadTrainingConfig:
    """The configuration by which the clients of a round train their heads."""
    job = job or work.learner.job
    loss = head_loss(job, work.learner.task.head_loss)
    mu = request.plan.get("proximal_mu", 0.0)
    return HeadTrainingConfig(
        job, loss, request.round, mu, work.private, inner_lr=inner_lr_of(job), moreau=MoreauSteps.of(job)
    )
