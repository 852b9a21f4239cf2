"""A site at work: the shards it holds, the learner it keeps warm, its answers to the server."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.gradient_sums import head_sums
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.dp.poisson import private_training
from atoll.client.dp.secure_aggregation import STAGES, SecureAggregationSession, contributions, sums
from atoll.client.heads.class_imbalance import loss_by_example
from atoll.client.heads.distillation import head_loss
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.statistics import statistics
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.redaction import redact
from atoll.client.state.error_feedback import compressed
from atoll.client.state.personalization import model_to_evaluate, train_ditto, train_fedper
from atoll.client.state.store import ClientStateStore
from atoll.client.training.local_sgd import train_model
from atoll.data.dataset import Dataset
from atoll.data.shard import Shard
from atoll.errors import BudgetExhausted, ConfigError, DataChanged, InputError
from atoll.job.closed_form import STATISTICS
from atoll.job.job import Job
from atoll.job.privacy import noise_locations, uses_secure_aggregation
from atoll.learning.learner import Learner
from atoll.privacy.dp_plan import distributed_terms, dp_plan_of
from atoll.protocol.messages import DataInfo, Failure, Hello, Measurement, Reply, Request, Update
from atoll.protocol.tensors import Tensors
from atoll.tasks import task_named
from atoll.tasks.told import check_told, fitting_rows, greeting_info, is_silent

logger = logging.getLogger(__name__)

KEPT_SHARDS = 4096
"""Clients whose shard and features a process keeps in memory; the least recent are let go."""

SECONDS_OF_SILENCE = 10.0
"""Between two lines on how far the features are."""

NO_STARTS: Mapping[str, Tensors] = {}

UNCACHED = "training features are not cached, for train.augment varies inputs and there are no cached_views"


class Shards(Protocol):
    """Where a site's data comes from: folders of its own, or a simulated population."""

    def names(self, job: Job) -> Sequence[str]:
        """The clients that live here."""
        ...

    def dataset(self, job: Job, client: str) -> Dataset:
        """One client's checked rows.

        Raises:
            DataError: they are not fit for the job's task.
        """
        ...

    def fingerprint(self, job: Job, client: str) -> str:
        """A hash of the rows' content; always the same where rows can't change.

        Raises:
            DataError: they are not fit for the job's task.
        """
        ...


@dataclass(frozen=True)
class LoadedShard:
    """One client's shard, split; where training sees nothing else, its features [views, n, width]."""

    train: Shard
    validation: Shard
    features: torch.Tensor | None


@dataclass(frozen=True)
class ChargedClients:
    """Who may train in a round, how their examples are protected, and what their ledgers say."""

    names: list[str]
    private: DpSgd | None = None
    charged: dict[str, int] = field(default_factory=dict)


@dataclass
class LoggedProgress:
    """Says from time to time how many features are computed."""

    last_message: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last_message >= SECONDS_OF_SILENCE:
            self.last_message = time.monotonic()
            logger.info("features: %d of %d examples", done, total)


@dataclass
class Site:
    """Answers for the clients that live in this process; everything costly stays warm.

    A shard must not change while a run goes on. The data of a `redact` site is not the server's
    to see: why it can't be used stays in the site's log, and the server gets a fixed sentence.
    """

    shards: Shards
    discreet: bool = False
    ledgers: PrivacyLedgers | None = None
    memory: ClientStateStore = field(default_factory=ClientStateStore)
    secure_session: SecureAggregationSession = field(default_factory=SecureAggregationSession)
    _learners: dict[str, Learner] = field(default_factory=dict)
    _held: dict[tuple[str, str, str], LoadedShard] = field(default_factory=dict)
    _fingerprints: dict[tuple[str, str], str] = field(default_factory=dict)

    def _policy_violation(self, job: Job, kind: str) -> str:
        """Why this site does not do what is asked, whoever asks; nothing if it does.

        A real site sends no sum without masks, no update where only sums are promised to be seen, no
        measurement where what is measured is promised to stay hidden, and nothing of its data that the job
        must have; and it takes no noise that the server can draw again.
        """
        if not self._is_real:
            return ""
        asked = _refused_request(job, kind) if self.discreet else ""
        return self._refused_noise(job) or asked or self._refused_facts(job)

    @property
    def _has_budget(self) -> bool:
        return self.ledgers is not None and self.ledgers.budget is not None

    @property
    def _is_real(self) -> bool:
        """Whether the data is somebody's own, and no simulation's."""
        return self.discreet or self._has_budget

    def _refused_noise(self, job: Job) -> str:
        if job.privacy.seeded_noise:
            return "its site takes no seeded noise, which anybody who has the job can subtract"
        if self._has_budget and not set(noise_locations(job)) - {"server"}:
            return "its site has a privacy budget, and the job adds no noise before the server sees an update"
        return ""

    def _refused_facts(self, job: Job) -> str:
        try:
            check_told(job, task_named(job.task.name), at_a_site=True, has_budget=self._has_budget)
        except ConfigError as error:
            return str(error)
        return ""

    def hello(self, job: Job) -> list[Hello]:
        """Who lives here, what their data looks like, or why they do not take part.

        Where greetings are silent they tell nothing of the data, and not how many examples there are.
        """
        return [self._hello(job, name) for name in self.shards.names(job)]

    def _hello(self, job: Job, name: str) -> Hello:
        refusal = self._policy_violation(job, "hello")
        if refusal:
            return Hello(name, {}, 0, refusal=refusal)
        try:
            dataset = self.shards.dataset(job, name)
            data_info = greeting_info(
                job, task_named(job.task.name), dataset,
                at_a_site=self._is_real, has_budget=self._has_budget,
            )  # fmt: skip
            self._fingerprints[name, job.hash] = self.shards.fingerprint(job, name)
        except InputError as error:
            return Hello(name, {}, 0, refusal=self._error_for_server(name, error, job.canonical))
        counted = 0 if is_silent(job, has_budget=self._has_budget) else len(dataset)
        return Hello(name, data_info, counted)

    def _fitting(self, job: Job, name: str) -> Dataset:
        """The client's rows that are learnt from; how many are left out stays in the site's own log."""
        dataset, task = self.shards.dataset(job, name), task_named(job.task.name)
        kept = fitting_rows(job, task, dataset, has_budget=self._has_budget)
        if len(kept) < len(dataset):
            left_out = len(dataset) - len(kept)
            logger.warning("%s: %d examples don't fit the job and are left out", name, left_out)
        return kept

    def answer(self, request: Request, names: Sequence[str]) -> Iterable[Reply]:
        """One reply for each named client; what went wrong at one does not touch the others."""
        try:
            job = Job.from_json(request.job)
            learner = self.learner(job, request.data_info)
        except InputError as error:
            return [Failure(name, self._error_for_server(name, error, request.job)) for name in names]
        refusal = self._policy_violation(job, request.kind)
        if refusal:
            return [Failure(name, refusal) for name in names]
        torch.set_num_threads(job.train.threads)
        if request.kind in STAGES:
            return self.secure_session.answer(request, names)
        charged_clients, failures = self.charge_privacy(job, request, names)
        held: dict[str, LoadedShard] = {}
        for name in charged_clients.names:
            try:
                held[name] = self._load_shard(learner, name, request.data_info)
            except InputError as error:
                failures.append(Failure(name, self._error_for_server(name, error, request.job)))
        replies: Iterable[Reply]
        if request.kind == "evaluate":
            replies = evaluate(learner, request, held, self.memory)
        elif request.kind == STATISTICS:
            replies = statistics(learner, request, held)
        elif request.kind == "train":
            updates = self._trained(learner, request, held, charged_clients.private)
            replies = compressed(updates, request, job, self.memory)
        else:
            replies = self._summed(learner, request, held, charged_clients)
        return chain(failures, replies) if failures else replies

    def _trained(
        self, learner: Learner, request: Request, held: dict[str, LoadedShard], private: DpSgd | None
    ) -> Iterable[Update]:
        if learner.job.personal.splits:
            shards = {name: h.train for name, h in held.items()}
            return train_fedper(learner, request, shards, self.memory)
        if learner.job.personal.keep is None or not held:
            return train(learner, request, held, private)

        def from_own(asked: Request, starts: Mapping[str, Tensors]) -> Iterable[Update]:
            return train(learner, asked, held, None, starts)

        return train_ditto(learner, request, list(held), from_own, self.memory)

    def _summed(
        self,
        learner: Learner,
        request: Request,
        held: dict[str, LoadedShard],
        charged_clients: ChargedClients,
    ) -> Iterator[Reply]:
        dp_plan, private = distributed_terms(learner.job), charged_clients.private
        if dp_plan is None or dp_plan.unit == "client":
            values = contributions(train(learner, request, held, private), dp_plan)
        elif learner.trains_on_features:
            assert private is not None
            examples, client_rows = feature_table(held, learner.job.train.device)
            loss = loss_by_example(learner.job, learner.task.head_loss)
            values = sums(head_sums(request.tensors, examples, client_rows, loss, private))
        else:
            from atoll.client.dp.dp_sgd_model import model_sums

            assert private is not None
            shards = {name: h.train for name, h in held.items()}
            values = sums(model_sums(learner, request.tensors, shards, private, request.round))
        return self.secure_session.encode_contributions(learner.job, request, values, charged_clients.charged)

    def charge_privacy(
        self, job: Job, request: Request, names: Sequence[str]
    ) -> tuple[ChargedClients, list[Reply]]:
        """(who may train and how, why the others may not), once everything is charged."""
        found = [dp_plan_of(job, unit) for unit in job.privacy.units]
        ours = [dp_plan for dp_plan in found if dp_plan is not None and dp_plan.where != "server"]
        if not ours or request.kind == "evaluate":
            return ChargedClients(list(names)), []
        assert self.ledgers is not None, "a site that is to keep a promise needs books"
        charged: dict[str, int] = {}
        refused: list[Reply] = []
        for name in names:
            try:
                fingerprint = self.shards.fingerprint(job, name)
                rounds = [self.ledgers.charge(name, fingerprint, job, dp_plan, request) for dp_plan in ours]
                charged[name] = max(rounds)
            except BudgetExhausted as spent:
                refused.append(Failure(name, str(spent)))
            except InputError as error:
                refused.append(Failure(name, self._error_for_server(name, error, request.job)))
        example = next((dp_plan for dp_plan in ours if dp_plan.unit == "example"), None)
        private = None if example is None else private_training(job, example, request.round, charged)
        return ChargedClients(list(charged), private, charged), refused

    def _error_for_server(self, client: str, error: InputError, known: str) -> str:
        """What the server is told of an error; a discreet site keeps the whole line in its own log."""
        if not self.discreet:
            return str(error)
        logger.warning("%s takes no part: %s", client, error)
        return redact(error, known)

    def learner(self, job: Job, data_info: DataInfo) -> Learner:
        """The warm learner of a job; its weights must be the very ones the server has.

        Raises:
            ConfigError, WeightsError: it can't be had here.
        """
        key = job.hash + json.dumps(data_info, sort_keys=True)
        if key not in self._learners:
            self._learners.clear()
            self._held.clear()
            learner = Learner.of(job, task_named(job.task.name), data_info, LoggedProgress())
            learner.check_fingerprint()
            if learner.uses_features and not learner.trains_on_features:
                logger.info("job %s: %s", job.name, UNCACHED)
            self._learners[key] = learner
        return self._learners[key]

    def _load_shard(self, learner: Learner, name: str, data_info: DataInfo) -> LoadedShard:
        key = (name, learner.job.hash, self._unchanged(learner.job, name))
        if key in self._held:
            self._held[key] = self._held.pop(key)
            return self._held[key]
        shard = learner.task.shard(self._fitting(learner.job, name), data_info)
        part, validation = learner.split(shard)
        features = learner.training_features(part) if learner.trains_on_features else None
        while len(self._held) >= KEPT_SHARDS:
            self._held.pop(next(iter(self._held)))
        self._held[key] = LoadedShard(learner.with_soft_labels(part), validation, features)
        return self._held[key]

    def _unchanged(self, job: Job, name: str) -> str:
        """The shard's fingerprint, which is the one it had at the run's hello, or at its first use.

        Raises:
            DataChanged: it is another one.
        """
        found = self.shards.fingerprint(job, name)
        if found != self._fingerprints.setdefault((name, job.hash), found):
            raise DataChanged("its data changed during the run; the next run takes it as it is then")
        return found


def _refused_request(job: Job, kind: str) -> str:
    """Why a real site does not answer such a request of such a job; nothing if it does."""
    if kind == STATISTICS and job.tune.head_init is None:
        return "its job forms no head of statistics"
    if kind == "sum" or (kind == "train" and uses_secure_aggregation(job)):
        return "its site sends such updates under masks only"
    if kind == "evaluate" and job.privacy.units:
        return "its site measures nothing under a promise of privacy"
    return ""


def train(
    learner: Learner,
    request: Request,
    held: dict[str, LoadedShard],
    private: DpSgd | None,
    starts: Mapping[str, Tensors] = NO_STARTS,
) -> Iterable[Update]:
    """Local training of the named clients: heads all at once, anything else one by one.

    Whose examples are all left out sends what anybody sends, noise or nothing that moved.
    """
    idle = [] if private is not None else [name for name, h in held.items() if not len(h.train)]
    if idle:
        busy = {name: h for name, h in held.items() if name not in idle}
        return chain((unmoved(name, request) for name in idle), train(learner, request, busy, None, starts))
    if learner.trains_on_features and held:
        examples, client_rows = feature_table(held, learner.job.train.device)
        local = replace(local_training(learner, request, private), starts=starts)
        return train_heads(request.tensors, examples, client_rows, local)
    if private is not None:
        from atoll.client.dp.dp_sgd_model import train_privately  # it brings in Opacus, which takes a second

        return (
            train_privately(
                learner, request.tensors, h.train, private,
                client=name, round=request.round, plan=request.plan,
            )
            for name, h in held.items()
        )  # fmt: skip
    return (
        train_model(
            learner, request.tensors, h.train, learner.job,
            client=name, round=request.round, plan=request.plan, begin=starts.get(name),
        )
        for name, h in held.items()
    )  # fmt: skip


def unmoved(client: str, request: Request) -> Update:
    """The update of a client without examples."""
    delta = {name: torch.zeros_like(tensor) for name, tensor in request.tensors.items()}
    nothing = torch.zeros((), dtype=torch.float64)
    states = {"train_loss.sum": nothing, "train_loss.count": nothing}
    return Update(client, request.round, delta, num_examples=0, states=states)


def local_training(learner: Learner, request: Request, private: DpSgd | None) -> HeadTrainingConfig:
    """How the clients of a round train their heads."""
    loss = head_loss(learner.job, learner.task.head_loss)
    return HeadTrainingConfig(learner.job, loss, request.round, request.plan.get("proximal_mu", 0.0), private)


def feature_table(held: dict[str, LoadedShard], device: str) -> tuple[FeatureTable, list[ClientRows]]:
    """The held shards' features in one table, and which of its rows are whose."""
    parts = [h.features for h in held.values() if h.features is not None]
    ends = np.cumsum([len(h.train) for h in held.values()]).tolist()
    client_rows = [
        ClientRows(name, np.arange(end - len(h.train), end))
        for (name, h), end in zip(held.items(), ends, strict=True)
    ]
    features, targets = torch.cat(parts, dim=1), torch.cat([h.train.table for h in held.values()])
    if not len(targets):  # something must fill the batches
        features = features.new_zeros(len(features), 1, features.shape[2])
        targets = targets.new_zeros(1, *targets.shape[1:])
    return FeatureTable.of(features, targets, device), client_rows


def _lessons(held: LoadedShard) -> Shard:
    return held.train


def evaluate(
    learner: Learner, request: Request, held: dict[str, LoadedShard], memory: ClientStateStore
) -> Iterator[Measurement]:
    """The model on each named client's validation split; one without a split measures nothing."""
    for name, h in held.items():
        model = model_to_evaluate(learner, request, name, memory, partial(_lessons, h))
        states = learner.evaluate(model, h.validation) if len(h.validation) else {}
        yield Measurement(name, request.round, len(h.validation), states)
