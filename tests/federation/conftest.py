"""A federation that is kept up for many tests: three clients of an image job on two sites."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import squeezenet1_1

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.write_shards import write_shards
from tests.federation.held_site import HOLD
from tests.federation.places import Federation, Running, federation_of
from tests.federation.turned_server import CUTS

SECRET = "Ann Smith"
"""Stands in the data of sites; no line of the server's may have it."""
CLIENTS = ["client-0000", "client-0001", "client-0002"]
KITS = ("client-0000", "pair", "other-code", "no-labels", "other-weights")

DIGITS: dict[str, Any] = {
    "name": "digits",
    "seed": 11,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "backbone": {"name": "torchvision:squeezenet1_1", "image_size": 32, "offline": True},
    "train": {"lr": 0.02, "batch_size": 16},
    "federation": {"clients": 3, "rounds": 2, "wait": 600, "round_timeout": 600},
}


CLASSES = {"classes": [str(digit) for digit in range(10)]}
"""What a job gives where sites tell nothing of their data."""


def job(name: str = "digits", **tables: Any) -> Job:
    """The image job with some keys changed; its name tells a run's lines from those of another."""
    return Job.parse(
        DIGITS | {"name": name} | {k: DIGITS.get(k, {}) | v for k, v in tables.items()}, origin="test"
    )


@dataclass
class Ring:
    """The federation, its three clients' shards, and what jobs give in process."""

    federation: Federation
    shards: Path
    known: dict[str, str] = field(default_factory=dict)

    def alone(self) -> Running:
        """The site of one client, joined anew unless it is there."""
        return self._there("client-0000", CLIENTS[:1])

    def pair(self) -> Running:
        """The site that hosts two clients, joined anew unless it is there."""
        return self._there("pair", CLIENTS[1:])

    def whole(self) -> Federation:
        """The federation with both sites connected."""
        self.alone(), self.pair()
        return self.federation

    def hold(self, job: str, round: int, client: str = "client-0000") -> Path:
        """From now on the client's training in that round stops at its begin, until the file is gone."""
        self.holds.mkdir(exist_ok=True)
        held = self.holds / f"{job}-{round}-{client}"
        held.touch()
        return held

    def cut(self, job: str, round: int, kind: str, *missing: str) -> Path:
        """The exchange is at its deadline once none but these clients are missing; then the file is gone."""
        cut = self.federation.folder / "cuts" / f"{job}-{round}-{kind}"
        cut.parent.mkdir(exist_ok=True)
        cut.write_text(" ".join(missing))
        return cut

    @property
    def holds(self) -> Path:
        return self.federation.folder / "holds"

    def _there(self, site: str, clients: list[str]) -> Running:
        running = self.federation.running.get(site)
        if running is None or running.process.poll() is not None:
            data = (self.shards / client for client in clients)
            running = self.federation.join(
                site, *data, main="tests.federation.held_site:main", env={HOLD: str(self.holds)}
            )
            running.says("is connected")
        return running

    def expected(self, job: Job) -> str:
        """The `model_sha256` of the simulation."""
        if job.hash not in self.known:
            out = self.federation.folder / f"sim-{job.hash[:12]}"
            self.known[job.hash] = simulate(job, out, on_event=ignore_events, report=False).model_sha256
        return self.known[job.hash]


def weights_home(folder: Path, seed: int) -> Path:
    """A folder for $TORCH_HOME with the job's weights, which `seed` decides."""
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.save(
            squeezenet1_1().state_dict(), folder / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
        )
    return folder


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ring]:
    folder = tmp_path_factory.mktemp("ring")
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(weights_home(folder / "weights", seed=1))
    write_shards(job(), folder / "shards")
    try:
        turned = {"main": "tests.federation.turned_server:main", "env": {CUTS: str(folder / "cuts")}}
        with federation_of(folder, *KITS, clients={"pair": CLIENTS[1:]}, **turned) as federation:
            yield Ring(federation, folder / "shards")
    finally:
        if before is None:
            del os.environ["TORCH_HOME"]
        else:
            os.environ["TORCH_HOME"] = before
