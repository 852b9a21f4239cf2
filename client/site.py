"""A site at work: the shards it holds, the learner it keeps warm, its answers to the server."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch

from atoll.client.audit_log import AuditLog
from atoll.client.dispatch import ClientData, LocalWork, ModelTrainer
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.dp.poisson import private_training
from atoll.client.dp.secure_aggregation import SecureAggregationSession
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.policy import Policy
from atoll.client.redaction import redact
from atoll.client.shard_cache import LoadedClients, LoadedShard, ShardCache, Shards
from atoll.client.state.store import ClientStateStore
from atoll.errors import BudgetExhausted, ConfigError, InputError
from atoll.job.closed_form import is_the_only_release
from atoll.job.job import Job
from atoll.job.privacy import noise_locations, uses_secure_aggregation
from atoll.learning.learner import Learner
from atoll.privacy.dp_plan import dp_plan_of
from atoll.protocol.messages import DataInfo, Failure, Hello, Reply
from atoll.protocol.requests import (
    ConfirmRequest,
    EvaluateRequest,
    KeysRequest,
    Request,
    SharesRequest,
    StatisticsRequest,
    TrainRequest,
    UnmaskedSumRequest,
)
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors
from atoll.tasks import task_named
from atoll.tasks.told import check_told, greeting_info, is_silent

if TYPE_CHECKING:
    from atoll.kit.signed_replies import ReplySigner

logger = logging.getLogger(__name__)

SECONDS_OF_SILENCE = 10.0
"""Between two lines on how far the features are."""

UNCACHED = "training features are not cached, for train.augment varies inputs and there are no cached_views"


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

    A shard must not change while a run goes on. The data of a `discreet` site is not the server's
    to see: why it can't be used stays in the site's log, and the server gets a fixed sentence. `ledgers`
    are needed where the job promises privacy that clients themselves keep.

    A client introduces itself; `answer` then takes the requests of `atoll.protocol.requests`:

    >>> import tempfile
    >>> from pathlib import Path
    >>> from atoll import load_job
    >>> from atoll.client.local_data import FolderShards
    >>> rows = Path(tempfile.mkdtemp()) / "rows.csv"
    >>> _ = rows.write_text("text,label\\nIt works.,good\\nIt broke.,bad\\n")
    >>> site = Site(FolderShards.of("north", [rows]))
    >>> [hello] = site.hello(load_job("jobs/bbc-news.toml", {"data.classes": ["bad", "good"]}))
    >>> hello.client, hello.num_examples, hello.refusal
    ('north', 2, '')
    """

    shards: Shards
    discreet: bool = False
    ledgers: PrivacyLedgers | None = None
    memory: ClientStateStore = field(default_factory=ClientStateStore)
    secure_session: SecureAggregationSession = field(default_factory=SecureAggregationSession)
    policy: Policy | None = None
    audit: AuditLog | None = None
    signer: ReplySigner | None = None
    """Signs what leaves a real site."""
    _learners: dict[str, Learner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cache = ShardCache(self.shards, has_budget=self._has_budget)

    def _policy_violation(self, job: Job, kind: type[Request] | type[Hello]) -> str:
        """Why this site does not do what is asked, whoever asks; nothing if it does.

        Its own policy comes first. A real site sends no sum without masks, no update where only sums are
        promised to be seen, no measurement where what is measured is promised to stay hidden, and nothing of
        its data that the job must have; and it takes no noise that the server can draw again.
        """
        if is_the_only_release(job) and kind not in (Hello, StatisticsRequest, EvaluateRequest):
            return "its examples' one release under this job are the sums for its head"
        if not self._is_real:
            return ""
        asked = _refused_request(job, kind) if self.discreet else ""
        own = self.policy.violation(job, kind) if self.policy is not None else ""
        return own or self._refused_noise(job) or asked or self._refused_sum(job) or self._refused_facts(job)

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

    def _refused_sum(self, job: Job) -> str:
        if self.discreet and uses_secure_aggregation(job) and self.secure_session.identity is None:
            return "its kit has no roster of the federation's sites, which a secure sum needs: provision anew"
        return ""

    def _unknown_client(self, job: Job, name: str) -> str:
        """Why others would not take part in a secure sum with that client of this site."""
        identity = self.secure_session.identity
        if identity is None or not uses_secure_aggregation(job) or identity.knows(name):
            return ""
        return "the federation's roster has no such client; expected it under `clients` in the SITES file"

    def _refused_facts(self, job: Job) -> str:
        try:
            check_told(job, task_named(job.task.name), at_a_site=True, has_budget=self._has_budget)
        except ConfigError as error:
            return str(error)
        return ""

    def _other_facts(self, job: Job, request: Request, names: Sequence[str]) -> str:
        """Why it does not work with facts that are not the job's: to fail with others tells something."""
        if not names or not self._is_real or not is_silent(job, has_budget=self._has_budget):
            return ""
        task = task_named(job.task.name)
        try:
            given = greeting_info(
                job, task, self.shards.dataset(job, names[0]), at_a_site=True, has_budget=self._has_budget
            )
            facts = task.merge_info([given])
        except InputError:
            return ""  # it is told where the data is loaded
        if all(request.data_info.get(key) == value for key, value in facts.items()):
            return ""
        return "the facts of its request are not those that its job gives"

    def hello(self, job: Job) -> list[Hello]:
        """Who lives here, what their data looks like, or why they do not take part.

        Where greetings are silent they tell nothing of the data, and not how many examples there are.
        """
        return [self._hello(job, name) for name in self.shards.names(job)]

    def _hello(self, job: Job, name: str) -> Hello:
        refusal = self._policy_violation(job, Hello) or self._unknown_client(job, name)
        if refusal:
            return Hello(name, {}, 0, refusal=refusal)
        try:
            dataset = self.shards.dataset(job, name)
            data_info = greeting_info(
                job, task_named(job.task.name), dataset,
                at_a_site=self._is_real, has_budget=self._has_budget,
            )  # fmt: skip
            self._cache.note_content(job, name)
        except InputError as error:
            return Hello(name, {}, 0, refusal=self._error_for_server(name, error, job.canonical))
        counts = self.shards.counts(job, name)
        for one in counts:
            logger.info("%s: %s", name, one.in_words)
        if is_silent(job, has_budget=self._has_budget):
            return Hello(name, data_info, 0)
        return Hello(name, data_info, len(dataset), counts=[one.as_json for one in counts])

    def answer(self, request: Request, names: Sequence[str]) -> Iterable[Reply]:
        """One reply for each named client; what went wrong at one does not touch the others."""
        try:
            job = Job.from_json(request.job)
            learner = self.learner(job, request.data_info)
        except InputError as error:
            return [Failure(name, self._error_for_server(name, error, request.job)) for name in names]
        refusal = self._policy_violation(job, type(request)) or self._other_facts(job, request, names)
        if refusal:
            return [Failure(name, refusal) for name in names]
        torch.set_num_threads(job.train.threads)
        if isinstance(request, KeysRequest | SharesRequest | ConfirmRequest):
            return self.secure_session.answer(request, names)
        charged, failures = self.charge_privacy(job, request, names)
        data, unfit = self.load(learner, request, charged.names)
        work = LocalWork(
            learner, data, self.memory, self.secure_session, charged.private, charged.charged,
            train_heads=self.train_heads, train_models=self.train_models,
        )  # fmt: skip
        failures += unfit
        replies = work.replies(request)
        return chain(failures, replies) if failures else replies

    def train_heads(
        self, head: Tensors, examples: FeatureTable, rows: Sequence[ClientRows], local: HeadTrainingConfig
    ) -> StackedUpdates:
        """The clients' updates of the shared head, which all train in one go."""
        return train_heads(head, examples, rows, local)

    @property
    def train_models(self) -> ModelTrainer | None:
        """How whole models are trained, where it isn't one by one."""
        return None

    def load(
        self, learner: Learner, request: Request, names: Sequence[str]
    ) -> tuple[ClientData, list[Reply]]:
        """(the clients' data, why that of others can't be used)."""
        loaded: dict[str, LoadedShard] = {}
        failures: list[Reply] = []
        for name in names:
            try:
                loaded[name] = self._cache.load(learner, name, request.data_info)
            except InputError as error:
                failures.append(Failure(name, self._error_for_server(name, error, request.job)))
        return LoadedClients(loaded, learner.job.train.device), failures

    def charge_privacy(
        self, job: Job, request: Request, names: Sequence[str]
    ) -> tuple[ChargedClients, list[Reply]]:
        """(who may train and how, why the others may not), once everything is charged."""
        found = [dp_plan_of(job, unit) for unit in job.privacy.units]
        ours = [dp_plan for dp_plan in found if dp_plan is not None and dp_plan.where != "server"]
        if not ours or isinstance(request, EvaluateRequest):
            return ChargedClients(list(names)), []
        assert self.ledgers is not None, "a site that is to keep a promise needs ledgers"
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

    def adopt(self, learner: Learner) -> None:
        """Train with a learner that is there already, wherever a request fits it."""
        self._learners[_fit(learner.job, learner.data_info)] = learner
        if learner.uses_features and not learner.trains_on_features:
            logger.info("job %s: %s", learner.job.name, UNCACHED)

    def learner(self, job: Job, data_info: DataInfo) -> Learner:
        """The warm learner of a job; its weights must be the very ones the server has.

        Raises:
            ConfigError, WeightsError: it can't be had here.
        """
        key = _fit(job, data_info)
        if key not in self._learners:
            self._learners.clear()
            self._cache.clear()
            learner = Learner.of(job, task_named(job.task.name), data_info, LoggedProgress())
            learner.check_fingerprint()
            self.adopt(learner)
        return self._learners[key]


def _fit(job: Job, data_info: DataInfo) -> str:
    """What a learner must have been made for to fit a request."""
    return job.hash + json.dumps(data_info, sort_keys=True)


def _refused_request(job: Job, kind: type[Request] | type[Hello]) -> str:
    """Why a real site does not answer such a request of such a job; nothing if it does."""
    if kind is StatisticsRequest and job.tune.head_init is None:
        return "its job forms no head of statistics"
    if kind is UnmaskedSumRequest or (kind is TrainRequest and uses_secure_aggregation(job)):
        return "its site sends such updates under masks only"
    if kind is EvaluateRequest and job.privacy.units:
        return "its site measures nothing under a promise of privacy"
    return ""
