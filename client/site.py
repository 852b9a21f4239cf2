"""A site: holds clients' shards, checks every request of the server, and does the work that it asks for."""

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
from atoll.learning.compatibility import check_agreed
from atoll.learning.learner import Learner
from atoll.privacy.dp_plan import dp_plan_of
from atoll.protocol.messages import ASSIGNED_STEPS, DataInfo, Failure, Hello, Reply
from atoll.protocol.requests import (
    ConfirmRequest,
    EvaluateRequest,
    KeysRequest,
    Request,
    SharesRequest,
    StatisticsRequest,
    TrainingRequest,
    TrainRequest,
    UnmaskedSumRequest,
)
from atoll.protocol.stacked_updates import StackedUpdates
from atoll.protocol.tensors import Tensors
from atoll.strategies.options import fedcompass_options
from atoll.tasks import task_named
from atoll.tasks.data_info import check_info_stated, greeting_info, is_silent

if TYPE_CHECKING:
    from atoll.kit.signed_replies import ReplySigner

logger = logging.getLogger(__name__)

SECONDS_OF_SILENCE = 10.0
"""The least time, in seconds, between two log lines about the computing of features."""

UNCACHED = "training features are not cached, for train.augment varies inputs and there are no cached_views"


@dataclass(frozen=True)
class ChargedClients:
    """The clients that may train in a round, how their examples are protected, and their charged rounds."""

    names: list[str]
    private: DpSgd | None = None
    charged: dict[str, int] = field(default_factory=dict)


@dataclass
class LoggedProgress:
    """Logs from time to time for how many examples features are computed."""

    last_message: float = field(default_factory=time.monotonic)

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last_message >= SECONDS_OF_SILENCE:
            self.last_message = time.monotonic()
            logger.info("features: %d of %d examples", done, total)


@dataclass
class Site:
    """Answers the server's requests for the clients of this process; learners and features stay in memory.

    `shards` gives each client's data, which must not change during a run. A `discreet` site, as every real
    one is, keeps the details of an error in its own log and sends the server a sentence without any data.
    `ledgers` record the privacy that clients have spent; they are needed where clients add the noise.
    `memory` stores the state that clients keep between rounds. A `policy` says which jobs the site accepts,
    and `audit` logs what it answers.

    Clients greet the server with `hello`; `answer` then takes the requests of `atoll.protocol.requests`:

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
    """Signs all messages of a real site; None in simulations."""
    _learners: dict[str, Learner] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cache = ShardCache(self.shards, self.memory, has_budget=self._has_budget)

    def _policy_violation(self, job: Job, kind: type[Request] | type[Hello]) -> str:
        """Why this site refuses such a request of the job, in one sentence; "" where it accepts.

        The site's own policy comes first. Besides, a real site refuses seeded noise, which the server could
        draw again; sums without masks; single updates where the job promises that only sums are seen;
        evaluation where metrics must stay secret; and facts about its data that the job must state itself.
        """
        if is_the_only_release(job) and kind not in (Hello, StatisticsRequest, EvaluateRequest):
            return "its examples' one release under this job are the sums for its head"
        if not self._is_real:
            return ""
        undiscreet = _refused_request(job, kind) if self.discreet else ""
        by_policy = self.policy.violation(job, kind) if self.policy is not None else ""
        return (
            by_policy
            or self._refused_noise(job)
            or undiscreet
            or self._refused_sum(job)
            or self._refused_facts(job)
        )

    @property
    def _has_budget(self) -> bool:
        return self.ledgers is not None and self.ledgers.budget is not None

    @property
    def _is_real(self) -> bool:
        """Whether the site holds real data, and not a simulation's."""
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
        """Why others would refuse a secure sum with this client: it is not in the roster; "" if it is."""
        identity = self.secure_session.identity
        if identity is None or not uses_secure_aggregation(job) or identity.knows(name):
            return ""
        return "the federation's roster has no such client; expected it under `clients` in the SITES file"

    def _refused_facts(self, job: Job) -> str:
        try:
            check_info_stated(job, task_named(job.task.name), at_a_site=True, has_budget=self._has_budget)
        except ConfigError as error:
            return str(error)
        return ""

    def _other_facts(self, job: Job, request: Request, names: Sequence[str]) -> str:
        """Why the request is refused: its data info differs from what the job states; "" if it does not.

        Working with other values could fail or not depending on private data, which would reveal something.
        """
        if not names or not self._is_real or not is_silent(job, has_budget=self._has_budget):
            return ""
        task = task_named(job.task.name)
        try:
            data_info = greeting_info(
                job, task, self.shards.dataset(job, names[0]), at_a_site=True, has_budget=self._has_budget
            )
            facts = task.merge_info([data_info])
        except InputError:
            return ""  # `load` reports it
        if all(request.data_info.get(key) == value for key, value in facts.items()):
            return ""
        return "the facts of its request are not those that its job gives"

    def hello(self, job: Job) -> list[Hello]:
        """Each client's greeting: its data info and number of examples, or a refusal with the reason.

        Under a promise of privacy, a secure sum or a privacy budget it reveals nothing about the data: the
        data info is what the job states, and the number of examples is 0.
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
            logger.info("%s: %s", name, one.description)
        if is_silent(job, has_budget=self._has_budget):
            return Hello(name, data_info, 0)
        return Hello(name, data_info, len(dataset), counts=[one.as_json for one in counts])

    def answer(self, request: Request, names: Sequence[str]) -> Iterable[Reply]:
        """One reply for each named client: an update, a measurement or a part of a secure sum.

        A client that refuses or fails is answered by a `Failure` with the reason, and does not affect the
        others. Privacy is charged to the clients' ledgers before any work begins.
        """
        try:
            job = Job.from_json(request.job)
            learner = self.learner(job, request.data_info)
        except InputError as error:
            return [Failure(name, self._error_for_server(name, error, request.job)) for name in names]
        refusal = (
            self._policy_violation(job, type(request))
            or self._other_facts(job, request, names)
            or _refused_steps(job, request)
        )
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
        """The clients' updates of the shared head; all clients are trained together."""
        return train_heads(head, examples, rows, local)

    @property
    def train_models(self) -> ModelTrainer | None:
        """The function that trains whole models of several clients together; None for one after the other."""
        return None

    def load(
        self, learner: Learner, request: Request, names: Sequence[str]
    ) -> tuple[ClientData, list[Reply]]:
        """(the data of the clients whose shards are usable, a failure for each other client)."""
        loaded: dict[str, LoadedShard] = {}
        failures: list[Reply] = []
        for name in names:
            try:
                loaded[name] = self._cache.load(learner, name, request)
            except InputError as error:
                failures.append(Failure(name, self._error_for_server(name, error, request.job)))
        return LoadedClients(loaded, learner.job.train.device), failures

    def charge_privacy(
        self, job: Job, request: Request, names: Sequence[str]
    ) -> tuple[ChargedClients, list[Reply]]:
        """(the clients that may train, a failure for each other client); their ledgers are charged first."""
        plans = [dp_plan_of(job, unit) for unit in job.privacy.units]
        ours = [dp_plan for dp_plan in plans if dp_plan is not None and dp_plan.where != "server"]
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
        """The sentence that the server gets about an error; a discreet site keeps the details in its log."""
        if not self.discreet:
            return str(error)
        logger.warning("%s takes no part: %s", client, error)
        return redact(error, known)

    def adopt(self, learner: Learner) -> None:
        """Use an existing learner for the requests of its job, instead of building one."""
        self._learners[_fit(learner.job, learner.data_info)] = learner
        if learner.uses_features and not learner.trains_on_features:
            logger.info("job %s: %s", learner.job.name, UNCACHED)

    def learner(self, job: Job, data_info: DataInfo) -> Learner:
        """The learner of a job, built at the first use; its weights must have the server's fingerprint.

        Raises:
            ConfigError, WeightsError: it can't be built here, or its weights differ from the server's.
        """
        key = _fit(job, data_info)
        if key not in self._learners:
            self._learners.clear()
            self._cache.clear()
            learner = Learner.of(job, task_named(job.task.name), data_info, LoggedProgress())
            check_agreed(learner)
            self.adopt(learner)
        return self._learners[key]


def _refused_steps(job: Job, request: Request) -> str:
    """Why the local steps that the request gives are none that its job lets it give; "" where they are."""
    if not isinstance(request, TrainingRequest) or ASSIGNED_STEPS not in request.plan:
        return ""
    steps, options = request.plan[ASSIGNED_STEPS], fedcompass_options(job)
    if options is None:
        return "its request gives a number of local steps, which the job's strategy doesn't"
    if not options.min_steps <= steps <= options.max_steps or steps != int(steps):
        return (
            f"its request gives {steps:g} local steps, and the job {options.min_steps} to {options.max_steps}"
        )
    return ""


def _fit(job: Job, data_info: DataInfo) -> str:
    """A key of all that a learner depends on: a request with the same key can use it."""
    return job.hash + json.dumps(data_info, sort_keys=True)


def _refused_request(job: Job, kind: type[Request] | type[Hello]) -> str:
    """Why a real site refuses a request of this kind for this job; "" where it accepts."""
    if kind is StatisticsRequest and job.tune.head_init is None:
        return "its job forms no head of statistics"
    if kind is UnmaskedSumRequest or (kind is TrainRequest and uses_secure_aggregation(job)):
        return "its site sends such updates under masks only"
    if kind is EvaluateRequest and job.privacy.units:
        return "its site measures nothing under a promise of privacy"
    return ""
