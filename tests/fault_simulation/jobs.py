"""The jobs that are played, and what a process makes once of each: data, learners, kits."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts
from atoll.errors import DataError
from atoll.job.job import Job
from atoll.kit.roster import FederationRoster, SiteIdentity
from atoll.kit.signed_replies import ReplySigner
from atoll.protocol.messages import DataInfo
from atoll.sim.population.population import Population
from tests.federation.places import provisioned

MOST_CLIENTS = 10
EXAMPLES = 12
CLASSES = [str(digit) for digit in range(10)]
CANARY = "canary-Ann-Smith"
"""Stands in what a site's data is called and in what is wrong with it; its rows are looked for as bytes."""

SECONDS_A_ROUND, SECONDS_OF_WAITING = 20.0, 40.0

KINDS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedadam": {"strategy": {"name": "fedadam"}},
    "scaffold": {"strategy": {"name": "scaffold"}, "train": {"optimizer": "sgd", "lr": 0.05}},
    "client privacy": {
        "privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-2},
    },
    "example privacy": {
        "privacy": {
            "unit": "example",
            "noise_multiplier": 1.0,
            "delta": 1e-2,
            "sampling_rate": 0.5,
            "steps": 1,
        },
    },
    "secure sum": {"federation": {"secure_aggregation": True}},
    "compressed": {"federation": {"compression": "int8"}},
}


MEASURED = ("fedadam", "compressed")
"""Kinds of jobs whose clients keep rows back to measure on: to compute metrics takes as long as to train."""


@cache
def job_of(kind: str, clients: int, rounds: int) -> Job:
    """A job that trains a head on 64 pixels."""
    table: dict[str, Any] = {
        "name": kind.replace(" ", "-"), "seed": 7,
        "task": {"name": "image-classification"},
        "data": {
            "source": "digits", "classes": CLASSES, "validation_fraction": 0.2,
            "partition": {"kind": "resampled", "examples": EXAMPLES},
        },
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "train": {"epochs": 1, "batch_size": EXAMPLES, "threads": 1},
        "federation": {
            "clients": clients, "rounds": rounds, "quorum": 0.5,
            "round_timeout": SECONDS_A_ROUND, "wait": SECONDS_OF_WAITING,
        },
        "evaluate": {"baselines": [], "every": rounds},
    }  # fmt: skip
    if "privacy" in KINDS[kind] and KINDS[kind]["privacy"]["unit"] == "example":
        table["data"]["partition"] = {"kind": "iid"}
    if kind not in MEASURED:
        table["data"]["validation_fraction"] = 0.0
    for name, section in KINDS[kind].items():
        table[name] = table.get(name, {}) | section
    return Job.parse(table, origin="fault simulation")


@cache
def population_of(kind: str, clients: int) -> Population:
    return Population.of(job_of(kind, clients, 1))


@cache
def dataset_of(kind: str, clients: int, client: str) -> Dataset:
    """One client's rows; few, also where they are dealt and not drawn."""
    rows = population_of(kind, clients).dataset(job_of(kind, clients, 1), client)
    return rows.select(list(range(EXAMPLES)))


@dataclass
class HeldShards:
    """One client's rows in memory, which can be called unreadable for a time."""

    kind: str
    clients: int
    client: str
    unreadable: int = 0
    """So many more times that they are asked for."""

    def names(self, job: Job) -> list[str]:
        return [self.client]

    def dataset(self, job: Job, client: str) -> Dataset:
        if client != self.client:
            raise DataError(f"client {client} does not live at this site")
        if self.unreadable:
            self.unreadable -= 1
            raise DataError(f"/data/{CANARY}.csv row 3: label {CANARY!r}, expected one of {CLASSES}")
        return dataset_of(self.kind, self.clients, client)

    def counts(self, job: Job, client: str) -> tuple[Counts, ...]:
        return ()

    def fingerprint(self, job: Job, client: str) -> str:
        if self.unreadable:
            self.dataset(job, client)
        return f"rows of {client}"


@dataclass
class SharedWork:
    """What sites of one process need not compute again: learners and loaded shards, which nobody changes."""

    learners: dict[str, Any] = field(default_factory=dict)
    loaded: dict[Any, Any] = field(default_factory=dict)


@cache
def shared_work() -> SharedWork:
    return SharedWork()


def learner_key(job: Job, data_info: DataInfo) -> str:
    """As `Site.learner` makes it."""
    return job.hash + json.dumps(data_info, sort_keys=True)


@cache
def kits() -> dict[str, Path]:
    """A kit for the server and one for each client that there can be."""
    folder = passing_folder("atoll-kits-")
    return provisioned(folder, tuple(client_name(n) for n in range(MOST_CLIENTS)), port=9092)


@cache
def roster() -> FederationRoster:
    found = FederationRoster.load(kits()["server"])
    assert found is not None
    return found


@cache
def identity_of(client: str) -> SiteIdentity:
    found = SiteIdentity.load(kits()[client])
    assert found is not None
    return SiteIdentity(found.key, roster())


@cache
def signer_of(client: str) -> ReplySigner:
    """The key of the client's site, with which it signs what it sends."""
    return ReplySigner.load(kits()[client])


@cache
def canaries_of(kind: str, clients: int, client: str) -> tuple[bytes, ...]:
    """Bytes that are in nothing but the client's rows: the features of two of its pictures."""
    from atoll.learning.learner import Learner
    from atoll.tasks import task_named

    job = job_of(kind, clients, 1)
    task = task_named(job.task.name)
    info = task.merge_info([{"classes": CLASSES, "pinned": True}])
    learner = Learner.of(job, task, info)
    rows = dataset_of(kind, clients, client)
    features = learner.features.for_training(task.shard(rows, info))
    return (features[0, 0].contiguous().numpy().tobytes(), features[0, 1].contiguous().numpy().tobytes())


def client_name(number: int) -> str:
    return f"client-{number:04d}"


def passing_folder(prefix: str) -> Path:
    """A new folder in memory that goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=memory_folder()))
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=1)
    return folder


def memory_folder() -> Path | None:
    """Where files are in memory, if the machine has such a place."""
    place = Path("/dev/shm")
    return place if place.is_dir() else None
