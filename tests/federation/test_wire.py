"""What is on the wire of real runs, read in the clear: updates without secure sums, and nothing with them.

The tap has the server's own key, so it sees what the server sees. What it must not find is computed
here: the same clients, replayed in process.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray
from scipy import stats

from atoll.job.job import Job
from atoll.kit.kit import ServerKit
from atoll.privacy.secagg import Vector, agreed_seed, mask_of
from atoll.privacy.secagg_encoding import flat, weighted
from atoll.protocol.messages import Reply, SecureMessage, Update
from atoll.protocol.requests import Request, TrainingRequest, TrainRequest, UnmaskedSumRequest, origin_of
from atoll.protocol.tensors import Tensors, tensor_bytes
from atoll.server.events import ignore_events
from atoll.server.run.run_job import run_job
from atoll.sim.baselines import BaselineRunner
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from tests.federation.conftest import CLASSES, CLIENTS, Ring, job
from tests.federation.wire import Tap, bodies, share_found, tapped, traffic

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]

CHANCE = 1e-9
"""A test of randomness fails by bad luck this often; of plain numbers it gives 0."""
SIGMAS = 6.0
WATCHED_SITE = "tests.federation.watched_site:main"


@dataclass
class Noted(InlineTransport):
    """Clients in this process, and all that they were asked and said; of a sum, what is summed too."""

    asked: dict[int, Tensors] = field(default_factory=dict)
    updates: dict[tuple[int, str], Update] = field(default_factory=dict)
    vectors: dict[tuple[int, str], Vector] = field(default_factory=dict)

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply]:
        if isinstance(request, UnmaskedSumRequest):
            plain = TrainRequest(**origin_of(request), tensors=request.tensors, plan=request.plan)
            self._note(super().send_and_receive(plain, names, timeout))
        if isinstance(request, TrainingRequest):
            self.asked[request.round] = request.tensors
        replies = list(super().send_and_receive(request, names, timeout))
        self._note(replies)
        yield from replies

    def _note(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Update):
                self.updates[reply.round, reply.client] = reply
            elif isinstance(reply, SecureMessage):
                self.vectors[reply.round, reply.client] = reply.content["vector"].numpy().view(np.uint64)


@dataclass(frozen=True)
class Heard:
    """A real run through the tap, the same run replayed, and what the sites kept secret in it."""

    folder: Path
    replayed: Noted
    secrets: list[dict[str, str]]
    expected: str
    ended_in: str

    def of_round(self, number: int) -> dict[str, dict[str, bytes]]:
        """What each client kept secret in a round."""
        return {
            told["name"]: {key: bytes.fromhex(value) for key, value in told.items() if key != "name"}
            for told in self.secrets
            if bytes.fromhex(told["context"]).split()[1] == str(number).encode()
        }


@dataclass
class Wire:
    """A federation whose sites are watched, and reach the server through a tap."""

    ring: Ring
    tap: Tap
    watch: Path

    def hear(self, setting: Job) -> Heard:
        """Run the job, replay it, and keep both."""
        folder = self.watch / f"run-{setting.name}"
        self.tap.into(folder / "tapped")
        secrets = self.watch / "secrets.jsonl"
        secrets.write_text("")
        result = self.ring.federation.run(setting)
        carrier = Noted.of(Population.of(setting))
        expected = run_job(
            setting, carrier, folder / "replayed", cached_test_set(carrier.population, None),
            baselines=BaselineRunner(carrier.population), on_event=ignore_events, report=False,
        )  # fmt: skip
        told = [json.loads(line) for line in secrets.read_text().splitlines()]
        return Heard(folder / "tapped", carrier, told, expected.model_sha256, result["model_sha256"])


@pytest.fixture(scope="module")
def wire(ring: Ring, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    folder = tmp_path_factory.mktemp("wire")
    kit = ServerKit.load(ring.federation.server)
    with tapped(kit, folder) as tap:
        tap.into(folder / "before")
        for site, clients in {"client-0000": CLIENTS[:1], "pair": CLIENTS[1:]}.items():
            table = ring.federation.kits[site] / "kit.toml"
            table.write_text(table.read_text().replace(f"port = {kit.address.port}", f"port = {tap.port}"))
            data = [ring.shards / client for client in clients]
            env = {"ATOLL_TEST_WATCH": str(folder)}
            ring.federation.join(site, *data, main=WATCHED_SITE, env=env)
        ring.federation.wait_online("client-0000", "pair")
        yield Wire(ring, tap, folder)
        for site in ("client-0000", "pair"):
            ring.federation.running[site].end()


@pytest.fixture(scope="module")
def secure(wire: Wire) -> Heard:
    return wire.hear(job("sealed", data=CLASSES, federation={"secure_aggregation": True}))


def delta_bytes(update: Update) -> list[bytes]:
    """A delta's tensors as they lie in memory."""
    return [tensor_bytes(tensor) for tensor in update.delta.values()]


def forms_of(update: Update, vector: Vector) -> list[bytes]:
    """Every form in which an update could get onto the wire."""
    numbers = flat(update.delta).numpy()
    contribution = weighted(update).numpy()
    return [
        *delta_bytes(update),
        *(form.astype(kind).tobytes() for form in (numbers, contribution) for kind in ("<f8", "<f4", ">f4")),
        vector.astype("<u8").tobytes(),
        vector.astype(">u8").tobytes(),
    ]


def masked_on(heard: Heard) -> list[Vector]:
    """The vectors that sites sent."""
    found = bodies(traffic(heard.folder, "up"), "content/vector")
    return [body["content/vector"].numpy().view(np.uint64) for body in found]


def randomness(vector: Vector) -> float:
    """How likely uniform numbers are to look less random: by the bytes of each place, and by size."""
    places = vector.astype("<u8").view(np.uint8).reshape(-1, 8)
    counts = [np.bincount(places[:, place], minlength=256) for place in range(8)]
    by_bytes = stats.chisquare(np.concatenate(counts)).pvalue
    by_size = stats.kstest(vector / 2.0**64, "uniform").pvalue
    return float(min(by_bytes, by_size))


def likeness(one: Vector, other: Vector) -> float:
    """The rank correlation of two vectors' signed numbers, in deviations of chance."""
    signed: tuple[NDArray[np.int64], ...] = (one.view(np.int64), other.view(np.int64))
    return float(abs(stats.spearmanr(*signed).statistic) * np.sqrt(len(one)))


def pair_mask(own: str, secrets: dict[str, dict[str, bytes]], length: int) -> Vector:
    """What a client's masks with all others come to."""
    total = np.zeros(length, dtype=np.uint64)
    key = X25519PrivateKey.from_private_bytes(secrets[own]["mask_key"])
    for name, told in secrets.items():
        if name != own:
            public = X25519PrivateKey.from_private_bytes(told["mask_key"]).public_key().public_bytes_raw()
            mask = mask_of(agreed_seed(key, public, told["context"]), length)
            total = total + mask if own < name else total - mask
    return total


def by_client(heard: Heard, number: int) -> dict[str, Vector]:
    """Each client's vector of a round as the server has it once the clients' own masks are off.

    That the tapped vectors are the contributions is shown here: with all secrets they open.
    """
    secrets, found = heard.of_round(number), {}
    for name, vector in itertools.product(CLIENTS, masked_on(heard)):
        bare = vector - mask_of(secrets[name]["seed"], len(vector))
        plain = heard.replayed.vectors[number, name]
        if np.array_equal(bare - pair_mask(name, secrets, len(vector)), plain):
            found[name] = bare
    assert sorted(found) == CLIENTS
    return found


def test_without_a_secure_sum_every_update_is_on_the_wire(wire: Wire) -> None:
    heard = wire.hear(job("plain", federation={"rounds": 1}))
    assert heard.ended_in == heard.expected
    sent = traffic(heard.folder, "up")
    assert sorted(heard.replayed.updates) == [(1, client) for client in CLIENTS]
    for update in heard.replayed.updates.values():
        assert share_found(delta_bytes(update), sent) == 1.0
    assert (
        share_found(map(tensor_bytes, heard.replayed.asked[1].values()), traffic(heard.folder, "down")) == 1.0
    )


def test_with_a_secure_sum_no_form_of_any_update_is_on_the_wire(secure: Heard) -> None:
    assert secure.ended_in == secure.expected
    wire, replayed = traffic(secure.folder), secure.replayed
    assert sorted(replayed.vectors) == list(itertools.product((1, 2), CLIENTS))
    # What is searched for is what would have been sent: multiples of 2^-32 of delta times examples.
    for at, update in replayed.updates.items():
        whole = np.rint(weighted(update).numpy() * 2.0**32).astype(np.int64)
        assert np.array_equal(whole.view(np.uint64), replayed.vectors[at])
    forms = [form for at, u in replayed.updates.items() for form in forms_of(u, replayed.vectors[at])]
    assert share_found(forms, wire) == 0.0
    for number in (1, 2):  # what everyone may see is seen, so the tap was not deaf
        assert share_found(map(tensor_bytes, replayed.asked[number].values()), wire) == 1.0


def test_what_the_server_gets_of_a_client_is_random_and_only_the_sum_is_not(secure: Heard) -> None:
    vectors = masked_on(secure)
    assert len(vectors) == 2 * len(CLIENTS)
    sums = [one + other for one, other in itertools.combinations(vectors, 2)]
    differences = [one - other for one, other in itertools.combinations(vectors, 2)]
    assert min(map(randomness, vectors + sums + differences)) > CHANCE
    for number in (1, 2):
        plain = {name: secure.replayed.vectors[number, name] for name in CLIENTS}
        assert max(map(randomness, plain.values())) < CHANCE
        bare = by_client(secure, number)
        for seen in [*vectors, *bare.values()]:
            assert max(likeness(seen, hidden) for hidden in plain.values()) < SIGMAS
        halves = [one + other for one, other in itertools.combinations(bare.values(), 2)]
        assert min(map(randomness, [*bare.values(), *halves])) > CHANCE
        total = np.sum(list(bare.values()), axis=0, dtype=np.uint64)
        assert np.array_equal(total, np.sum(list(plain.values()), axis=0, dtype=np.uint64))


def test_public_keys_are_on_the_wire_and_no_secret_is(secure: Heard) -> None:
    wire = traffic(secure.folder)
    for number in (1, 2):
        told = secure.of_round(number)
        assert sorted(told) == CLIENTS
        for secret in told.values():
            keys = [X25519PrivateKey.from_private_bytes(secret[key]) for key in ("cipher_key", "mask_key")]
            assert b"".join(key.public_key().public_bytes_raw() for key in keys) in wire
            for hidden in (secret["cipher_key"], secret["mask_key"], secret["seed"]):
                assert not any(form in wire for form in (hidden, hidden[::-1], hidden.hex().encode()))


def test_the_same_search_finds_a_site_that_leaves_its_masks_off(wire: Wire) -> None:
    (wire.watch / "unmasked").touch()
    try:
        once = {"rounds": 1, "secure_aggregation": True}
        heard = wire.hear(job("unmasked", data=CLASSES, federation=once))
    finally:
        (wire.watch / "unmasked").unlink()
    vectors, plain = masked_on(heard), list(heard.replayed.vectors.values())
    assert share_found([v.astype("<u8").tobytes() for v in plain], traffic(heard.folder)) == 1.0
    assert max(map(randomness, vectors)) < CHANCE
    assert all(max(likeness(vector, hidden) for vector in vectors) > SIGMAS for hidden in plain)
