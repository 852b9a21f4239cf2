"""All simulated clients of a run: one source, whose test part is held out and the rest partitioned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts, those_left
from atoll.data.lazy import LazyRows
from atoll.data.shard import Shard, canonical_order
from atoll.job.attack import POISONS_LABELS
from atoll.job.job import Job
from atoll.learning.learner import Learner, ranked
from atoll.protocol.messages import DataInfo
from atoll.server.roster import MOST_CLIENTS, ClientRoster
from atoll.server.run.test_set import counts_of_source, hold_out, read_source, unit_keys
from atoll.sim.attacks.hostile_clients import described, hostile_names
from atoll.sim.attacks.poisoned_labels import poisoned
from atoll.sim.population.assignment import Assignment, FixedAssignment, Rows
from atoll.sim.population.partition import check_keys, partition
from atoll.tasks import task_named
from atoll.tasks.data_info import fitting_rows, greeting_info, is_silent


@dataclass(frozen=True)
class Population:
    """All clients of a simulation; a client's rows of `train` and its shard are made only when needed.

    `keys` are the hashes of the rows of `train`, `assignment` says which client holds which of them.
    """

    job: Job
    train: Dataset
    test: Dataset
    keys: list[bytes]
    assignment: Assignment
    notes: tuple[str, ...] = ()
    source_counts: tuple[Counts, ...] = ()
    _whole: dict[str, Shard] = field(default_factory=dict)
    _facts: dict[str, DataInfo] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job) -> Population:
        """Read the job's source, hold out the test part, and partition the rest.

        Raises:
            DataError, ConfigError: the source is missing, or unfit for the task or the partition.
        """
        table = read_source(job)
        check_keys(table.train, job.data.partition)
        train, test = hold_out(table, job)
        task = task_named(job.task.name)
        whole, train = len(train), fitting_rows(job, task, train)
        left_out = {"that don't fit the job": whole - len(train)}
        keys = task.keys(train)
        units = unit_keys(task, train, keys)
        assignment = partition(train, ranked(units, job.seed, "partition"), job, task.groups(train))
        if isinstance(assignment, FixedAssignment) and len(held := assignment.held()) < len(keys):
            left_out["dealt to no client"] = len(keys) - len(held)
            train, keys = train.select(held), [keys[row] for row in held.tolist()]
            assignment = assignment.among(held)
        dealt = Counts("training examples", whole, len(train), those_left(left_out))
        counts = (*counts_of_source(table, job, whole, len(test)), *((dealt,) if dealt.left_out else ()))
        return cls(job, train, test, keys, assignment, table.notes, counts)._with_hostile_clients()

    def _with_hostile_clients(self) -> Population:
        """The same population with the labels of hostile clients changed as the job's attack says."""
        job = self.job
        if job.attack.kind is None:
            return self
        names = hostile_names(job, client_names(job.federation.clients))
        notes = (*self.notes, described(job.attack, names, job.federation.clients))
        if job.attack.kind not in POISONS_LABELS:
            return replace(self, notes=notes)
        rows = np.concatenate(self.assignment.rows([number_of(name) for name in names]))
        train = poisoned(self.train, rows, job)
        return replace(self, train=train, keys=task_named(job.task.name).keys(train), notes=notes)

    def names(self, job: Job) -> Sequence[str]:
        return client_names(job.federation.clients)

    def roster(self, job: Job) -> ClientRoster:
        """The roster of all clients, computed from the whole table instead of each client's greeting.

        Raises:
            ConfigError, DataError: greetings would reveal more than real sites may, or the data doesn't fit.
        """
        key = job.task.model_dump_json() + job.data.model_dump_json() + str(is_silent(job))
        if key not in self._facts:
            self._facts[key] = greeting_info(job, task_named(job.task.name), self.train)
        sizes = self.assignment.sizes
        reported = np.zeros_like(sizes) if is_silent(job) else sizes
        return ClientRoster(self.names(job), reported, [self._facts[key]])

    def dataset(self, job: Job, client: str) -> Dataset:
        return self.train.select(self.assignment.rows([number_of(client)])[0])

    def fingerprint(self, job: Job, client: str) -> str:
        """Always empty, because simulated clients' data can't change during a run."""
        return ""

    def counts(self, job: Job, client: str) -> Sequence[Counts]:
        """Always empty, because examples are left out before the rest is partitioned."""
        return ()

    @cached_property
    def data_hashes(self) -> Mapping[str, str]:
        """A hash of each client's examples and of the server's test set, by name, whatever their order.

        Clients that draw their examples from one table have that table's hash, and so have very many clients.
        """
        integers, assignment = _as_integers(self.keys), self.assignment
        clients = self.job.federation.clients
        if isinstance(assignment, FixedAssignment) and clients <= MOST_CLIENTS:
            upto = np.concatenate([_as_integers([bytes(32)]), integers[assignment.row_order]]).cumsum(
                0, dtype=np.uint64
            )
            sums = upto[assignment.starts[1:]] - upto[assignment.starts[:-1]]
            hashes = dict(zip(client_names(clients), map(_in_hex, sums), strict=True))
        else:
            hashes = {"all clients": _in_hex(integers.sum(0, dtype=np.uint64))}
        if len(self.test):
            hashes["the server's test set"] = _in_hex(_as_integers(self.test_keys).sum(0, dtype=np.uint64))
        return hashes

    @cached_property
    def test_keys(self) -> list[bytes]:
        """The hashes of the test set's examples."""
        return task_named(self.job.task.name).keys(self.test)

    def whole(self, learner: Learner) -> Shard:
        """All training examples as one shard, cached; row i of `train` is its row `place[i]`."""
        key = json.dumps(learner.data_info, sort_keys=True)
        if key not in self._whole:
            self._whole.clear()
            self._whole[key] = learner.task.shard(self.train, learner.data_info, self.keys)
        return self._whole[key]

    @cached_property
    def place(self) -> Rows:
        """The index in `whole` of each row of `train`, [rows]."""
        place = np.empty(len(self.keys), dtype=np.int64)
        place[np.array(canonical_order(self.keys))] = np.arange(len(self.keys))
        return place

    def test_shard(self, learner: Learner) -> Shard | None:
        """The held-out test examples as a shard; None if the job holds nothing out."""
        return learner.task.shard(self.test, learner.data_info, self.test_keys) if len(self.test) else None


def _as_integers(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    """Examples' hashes as numbers of 64 bits, [n, 4], which are added up modulo 2^64."""
    return np.frombuffer(b"".join(keys), dtype="<u8").astype(np.uint64, copy=False).reshape(-1, 4)


def _in_hex(integers: NDArray[np.uint64]) -> str:
    return integers.astype("<u8").tobytes().hex()


def client_names(count: int) -> Sequence[str]:
    """The names `client-0000`, `client-0001`, …, made lazily, with enough digits that they sort by number."""
    width = max(4, len(str(count - 1)))
    return LazyRows(lambda i: f"client-{i:0{width}d}", range(count))


def number_of(client: str) -> int:
    """The number in a client's name: 3 for `client-0003`."""
    return int(client.removeprefix("client-"))
