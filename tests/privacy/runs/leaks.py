"""Whole runs on two data sets that differ in one record of one client: what leaves must not tell which.

The real server and the real site work on files on disk; only who carries their messages is in memory. Each
private mechanism is watched where it adds its noise: what it would have noised is kept, and what it gives
out is a number that no data decides. All that leaves is then a function of the mechanism's outputs if, and
only if, it is equal byte for byte on both data sets; and the kept sums may differ by the sensitivity.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

import atoll.client.dp.adaptive_norms
import atoll.client.dp.dp_sgd_model
import atoll.client.heads.train
import atoll.privacy.central
import atoll.server.rounds.central_dp
from atoll.client.dp.adaptive_norms import ClippingScales
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.heads.layers import Layers
from atoll.client.local_data import FolderShards
from atoll.client.site import Site
from atoll.errors import JobError
from atoll.job.job import Job
from atoll.job.privacy import guarantee_of
from atoll.kit.roster import FederationRoster
from atoll.learning.learner import Learner
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.noise import Lattice, seeded
from atoll.privacy.secagg_encoding import FixedPointCodec
from atoll.protocol.messages import Failure, Measurement, Reply, SecureMessage, Update, hello_to_json
from atoll.protocol.requests import Request
from atoll.protocol.tensors import Tensors
from atoll.server.roster import ClientRoster
from atoll.server.run.run_job import run_job
from atoll.strategies.private_closed_form import SENSITIVITY
from tests.privacy.detectors import Detected, check_silence
from tests.privacy.runs.record_neighbours import CLIENTS
from tests.support.small import believing

Vector = NDArray[np.float64]
Place = tuple[str, ...]
"""Where noise is added: at whose training, in which step, to which layer."""

TIMES = ("seconds", "seconds_at_clients", "peak_rss_mb")
"""Keys of a run's files that say how long something took, or how much memory."""
SLACK = 1e-4
"""Relative, for what float32 and the grid round."""


@dataclass
class Leaving:
    """What left a run: sums before their noise by place, replies as the server had them, the run's files."""

    sums: dict[Place, list[Vector]] = field(default_factory=lambda: defaultdict(list))
    sent: list[Any] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    charged: dict[str, int] = field(default_factory=dict)
    """By unit, the releases in the clients' own ledgers: the most that any client was charged for."""

    def output(self, place: Place, values: Vector, step: float) -> Vector:
        """Keep what would be noised; give out whole multiples of `step` that no data decides."""
        kept = self.sums[place]
        kept.append(np.asarray(values, dtype=np.float64).copy())
        seed = zlib.crc32(repr((place, len(kept))).encode())
        given = np.random.default_rng(seed).integers(-(2**24), 2**24, size=values.shape)
        return given.astype(np.float64) * step


@dataclass(frozen=True)
class WatchedNoise:
    """Stands in for one step's noise of one layer, of so many clients: gives `replacement` out instead."""

    leaving: Leaving
    clients: Sequence[str]
    place: Place
    replacement: torch.Tensor

    def added(self, gradient: torch.Tensor) -> torch.Tensor:
        for client, row in zip(self.clients, gradient, strict=False):
            self.leaving.sums[client, *self.place].append(row.double().cpu().numpy().copy())
        return self.replacement[: len(gradient)]


def given_heads(
    leaving: Leaving, layers: Layers, clients: Sequence[str], step: int, private: DpSgd
) -> list[WatchedNoise]:
    """The numbers that a step's layers move by, for each client, none where a layer is padded."""
    heads = []
    for client in clients:
        drawn = np.random.default_rng(zlib.crc32(repr((client, step, len(leaving.sent))).encode()))
        shapes = [(layer.weight, (layer.outputs, layer.inputs)) for layer in layers.layers]
        shapes += [(layer.bias, (layer.outputs,)) for layer in layers.layers]
        size = private.clipping_norm / private.divisor
        head = {name: torch.from_numpy(drawn.uniform(-size, size, shape)) for name, shape in shapes}
        heads.append(layers.stack(head, "cpu"))
    stacks = [torch.cat(parts) for parts in zip(*heads, strict=True)]
    return [
        WatchedNoise(leaving, clients, (str(step), layer.weight), stack)
        for layer, stack in zip(layers.layers, stacks, strict=True)
    ]


@contextmanager
def watched(leaving: Leaving) -> Iterator[None]:
    """Within, no mechanism's output is decided by anybody's data."""

    def central(lattice: Lattice, values: Vector, *, into: Vector | None = None) -> Vector:
        return leaving.output(("server",), values.copy(), lattice.granularity).copy()

    def whole_model(noise: Any, total: Tensors) -> Tensors:
        step, client = noise.lattice.granularity, noise.client
        return {
            name: torch.from_numpy(leaving.output((client, name), total[name].numpy(), step))
            for name in noise.names
        }

    def with_client(noise: Any, private: DpSgd, client: str, parameters: Any) -> None:
        made(noise, private, client, parameters)
        noise.client = client

    def heads(
        layers: Layers, steps: Sequence[tuple[str, int]], private: DpSgd, device: str
    ) -> list[list[WatchedNoise]]:
        return [
            given_heads(leaving, layers, [client for client, count in steps if count > s], s, private)
            for s in range(max(count for _, count in steps))
        ]

    def integers(codec: FixedPointCodec, values: Vector) -> NDArray[np.uint64]:
        if codec.lattice is None:
            return plain(codec, values)
        given = leaving.output(("sum",), values, codec.granularity)
        return np.rint(given / codec.granularity).astype(np.int64).view(np.uint64)

    def fraction(within: int, answered: int, **more: Any) -> float:
        leaving.sums[("fraction",)].append(np.array([float(within)]))
        return 0.5

    def counts(scales: ClippingScales, within: torch.Tensor, drawn: torch.Tensor) -> None:
        counted(scales, within, drawn)
        # By client: who trains together, and in which order, goes by how many examples each has.
        for client, (inside, of) in zip(scales.clients, scales._counts, strict=False):
            leaving.sums[("count", client)].append(np.array([inside - of / 2]))

    counted = ClippingScales.count
    plain, made = FixedPointCodec.integers, atoll.client.dp.dp_sgd_model._Noise.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lattice, "added", central)
        patch.setattr(atoll.client.dp.dp_sgd_model._Noise, "__init__", with_client)
        patch.setattr(atoll.client.dp.dp_sgd_model._Noise, "added", whole_model)
        patch.setattr(atoll.client.heads.train, "stacked_noise", heads)
        patch.setattr(FixedPointCodec, "integers", integers)
        patch.setattr(atoll.privacy.central, "noised_fraction", fraction)
        patch.setattr(ClippingScales, "count", counts)
        patch.setattr(atoll.client.dp.adaptive_norms, "noised_fraction", lambda *args, **more: 0.25)
        patch.setattr(atoll.server.rounds.central_dp, "entropy", seeded(1))  # who is asked is no data's doing
        yield


@dataclass
class InMemory:
    """A transport to one real site, which notes what it hears."""

    site: Site
    leaving: Leaving
    engine: str = "in memory"
    uses_masking: bool = True
    roster: FederationRoster | None = None

    def discover_clients(self, job: Job) -> ClientRoster:
        hellos = self.site.hello(job)
        self.leaving.sent += [hello_to_json(hello) for hello in hellos]
        return ClientRoster.of(hellos)

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Reply]:
        for reply in self.site.answer(request, names):
            self.leaving.sent.append(_comparable(reply, Job.from_json(request.job)))
            yield reply


def _comparable(reply: Reply, job: Job) -> Any:
    """What of a reply no data may decide.

    Keys and masked vectors are random, their shapes are not. Where the server adds a client's noise it sees
    the client's update: who reads what the server writes does not, and that is compared.
    """
    match reply:
        case Failure():
            return (reply.client, reply.reason)
        case SecureMessage():
            return (reply.client, {n: (str(t.dtype), tuple(t.shape)) for n, t in reply.content.items()})
        case Update() if "client" in job.privacy.units:
            return (reply.client, sorted(reply.delta), sorted(reply.states))
        case Measurement() if "client" in job.privacy.units:
            return (reply.client, reply.num_examples, sorted(reply.states))
        case Update():
            return (reply.client, reply.num_examples, dict(reply.delta), dict(reply.states))
        case _:
            return (type(reply).__name__, vars(reply))


def run_of(job: Job, folders: Sequence[Path], out: Path, warm: dict[str, Learner]) -> Leaving:
    """Play the job with one real site that holds these folders, a client each; a failure is told too.

    `out` must not be there, and is gone afterwards: its name is in the run's ledger.
    """
    leaving, books = Leaving(), out.with_name(f"{out.name} ledgers")
    shards = FolderShards.of("here", folders)
    site = Site(
        shards, discreet=True, ledgers=PrivacyLedgers(books), secure_session=believing(), _learners=warm
    )
    with watched(leaving):
        try:
            run_job(job, InMemory(site, leaving), out, lambda learner: None, report=False)
        except JobError as error:
            leaving.sent.append(f"the run failed: {error}")
    leaving.files, leaving.charged = files_of(out), charged_in(books)
    shutil.rmtree(out, ignore_errors=True), shutil.rmtree(books, ignore_errors=True)
    return leaving


def charged_in(books: Path) -> dict[str, int]:
    """The most releases in any ledger of this folder, by unit; read line by line."""
    most: dict[str, int] = defaultdict(int)
    for path in books.glob("*.jsonl"):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        unit = "client" if path.stem.endswith(".client") else "example"
        most[unit] = max(most[unit], sum(entry.get("count", 0) for entry in entries))
    return dict(most)


def check_claim(leaving: Leaving) -> None:
    """Raises Detected where the run claims other releases than its ledgers hold, or than got noise."""
    claims = leaving.files.get("result.json", {}).get("privacy", {}).get("units", {})
    for unit, charged in leaving.charged.items():
        if unit in claims and claims[unit]["releases"] != charged:
            raise Detected(f"{claims[unit]['releases']} releases are claimed, the ledgers have {charged}")
    for unit, claim in claims.items():
        seen = releases_seen(leaving, claim)
        if claim["releases"] != seen:
            raise Detected(f"{unit}: {claim['releases']} releases are claimed, {seen} sums got noise")


def releases_seen(leaving: Leaving, claim: Mapping[str, Any]) -> int:
    """How many sums got noise: at the server, in all, and at clients, the most of any client.

    Statistics, and integers for a secure sum, are noised without a client's name: each client has as many.
    """
    by_lattice = len(leaving.sums.get(("server",), ()))
    if claim["where"] == "server":
        return by_lattice
    if claim["where"] == "distributed":
        return len(leaving.sums.get(("sum",), ())) // len(CLIENTS)
    if "sums_of_features" in claim:
        return math.ceil(by_lattice / len(CLIENTS))
    tensors: dict[tuple[str, str], int] = defaultdict(int)
    for place, vectors in leaving.sums.items():
        if len(place) > 1:  # by tensor, or by step and tensor
            tensors[place[0], place[-1]] += len(vectors)
    return max(tensors.values(), default=0)


def files_of(out: Path) -> dict[str, Any]:
    """The run's files, without how long things took."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".json":
            found[name] = _without_times(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                values = {key: tensors.get_tensor(key) for key in list(tensors.keys())}
                found[name] = (dict(tensors.metadata() or {}), values)
        else:
            found[name] = path.read_bytes()
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def check_leaving(job: Job, one: Leaving, other: Leaving) -> float:
    """How far the sums moved, as a part of what may be; raises Detected where more differs.

    A record more or less moves a sum of examples by the clipping norm at most; a client whose data changes
    takes another's place, and moves a sum of clients by twice as much.
    """
    check_claim(one), check_claim(other)
    check_silence(one.sent, other.sent, "what a site says")
    check_silence(one.files, other.files, "the run's directory")
    check_silence(_shapes(one), _shapes(other), "which sums are noised")
    moved: dict[tuple[Any, ...], float] = defaultdict(float)
    for place, vectors in one.sums.items():
        for number, (a, b) in enumerate(zip(vectors, other.sums[place], strict=True)):
            # The layers of one step, or the tensors of one model, are one release.
            release = (number, place[:2]) if len(place) == 3 else (number, place[:1])
            moved[release] += float(np.square(a - b).sum())
    parts = [value**0.5 / _allowed(job, place, number) for (number, place), value in moved.items()]
    if max(parts, default=0.0) > 1 + SLACK:
        raise Detected(f"a sum moves by {max(parts):.4g} of what it may")
    return max(parts, default=0.0)


def _shapes(leaving: Leaving) -> Mapping[str, Any]:
    return {" ".join(place): [v.shape for v in vectors] for place, vectors in leaving.sums.items()}


def _allowed(job: Job, place: Place, number: int) -> float:
    """How far one unit may move what is noised there for the so many-th time, from 0."""
    if place == ("fraction",):
        return 1.0
    if place == ("count",):
        return 0.5  # within the norm or not, one example more or less
    if job.tune.head_init is not None and job.privacy.unit == "example":
        return SENSITIVITY
    if job.tune.head_init is not None and number == 0:
        return 2.0 * SENSITIVITY
    clients = 2.0 * guarantee_of(job, "client").clipping_norm if "client" in job.privacy.units else 0.0
    if place == ("server",):
        return clients
    if place == ("sum",):
        plans = [dp_plan_of(job, unit) for unit in job.privacy.units]
        [plan] = [p for p in plans if p is not None and p.where == "distributed"]
        return clients if plan.unit == "client" else plan.promise.clipping_norm
    plan = dp_plan_of(job, "example")
    assert plan is not None
    return plan.promise.clipping_norm / plan.divisor
