"""Checks of the real code by the detectors: each passes on it, and fails on a bug that it watches for."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy.special import binom
from torch import nn

from atoll.client.dp import dp_sgd_model
from atoll.client.dp.adaptive_norms import SCALE
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.gradient_sums import head_sums
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.dp.mixed_examples import mixing_layers
from atoll.client.dp.poisson import private_training
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.site import Site
from atoll.data.dataset import Dataset
from atoll.errors import BudgetExhausted, ConfigError
from atoll.job.job import Job
from atoll.learning.compatibility import check_fits
from atoll.privacy import accounting, secagg, secagg_encoding
from atoll.privacy.accounting import Release
from atoll.privacy.auditing import gaussian_sums
from atoll.privacy.auditing.epsilon_bounds import Family
from atoll.privacy.dp_plan import DpPlan, dp_plan_of
from atoll.privacy.ledger import Ledger
from atoll.privacy.noise import entropy
from atoll.protocol.messages import Update
from atoll.protocol.requests import TrainRequest
from atoll.protocol.tensors import Tensors
from atoll.server.rounds import aggregation, evaluation, round_log
from atoll.server.rounds.central_dp import NORM, CentralDp, LedgerLocation
from atoll.server.rounds.run_state import Run
from atoll.server.rounds.validation import Validation
from atoll.sim.audit.example_canaries import CanaryFeatures
from atoll.sim.audit.replay import RoundTranscript, fresh_learner
from atoll.sim.population.population import Population
from tests.privacy import detectors
from tests.privacy.detectors import Detected, adversaries, silent

Vector = NDArray[np.float64]

MODEL: Tensors = {"b": torch.zeros(6), "w": torch.zeros(6, 5)}
WIDE: Tensors = {"w": torch.zeros(1000, 1000)}
Z, C, COHORT = 1.3, 0.5, 4
RATE = 0.25


def job(privacy: dict[str, Any], **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "watched", "seed": 1,
        "task": {"name": "image-classification"}, "data": {"source": "digits"},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "train": {"lr": 1.0, "batch_size": 8},
        "federation": {"clients": COHORT, "rounds": 50},
    }  # fmt: skip
    return Job.parse(table | tables | {"privacy": privacy}, origin="test")


def clients(**more: Any) -> dict[str, Any]:
    return {"unit": "client", "noise_multiplier": Z, "delta": 1e-3, "clipping_norm": C} | more


def examples(**more: Any) -> dict[str, Any]:
    return {
        "unit": "example", "noise_multiplier": Z, "delta": 1e-4, "clipping_norm": C, "sampling_rate": RATE,
        "steps": 1,
    } | more  # fmt: skip


def flat(tensors: Tensors) -> Vector:
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)]).numpy()


def people(model: Tensors, count: int = COHORT - 1) -> list[Update]:
    draw = torch.Generator().manual_seed(1)
    deltas = [{n: torch.randn(t.shape, generator=draw) for n, t in model.items()} for _ in range(count)]
    sizes = (0.02, 0.5, 2.0, 0.1, 1.0)
    return [
        Update(f"c{i}", 1, {n: sizes[i % 5] * t for n, t in delta.items()}, 5 * i + 1)
        for i, delta in enumerate(deltas)
    ]


class Quiet(CentralDp):
    """Protection that draws noise of zero, to see what is noised."""

    def _random_bits_of(self, purpose: str, round: int) -> Any:
        return silent


def terms_for(setting: Job, unit: str) -> DpPlan:
    dp_plan = dp_plan_of(setting, cast(Any, unit))
    assert dp_plan is not None
    return dp_plan


_scratch = tempfile.TemporaryDirectory(prefix="atoll-watchdogs-")


def new_folder() -> Path:
    """An empty folder that is gone when the tests end."""
    return Path(tempfile.mkdtemp(dir=_scratch.name))


def protection(kind: type[CentralDp], setting: Job, folder: Path | None = None) -> CentralDp:
    folder = folder or new_folder()
    ledgers = LedgerLocation(folder / "ledger.jsonl", "test")
    return kind(setting, terms_for(setting, "client"), ledgers, "run")


def central(kind: type[CentralDp], updates: Sequence[Update], model: Tensors, **privacy: Any) -> Vector:
    """What is released of those updates, times the public divisor: a sum, with noise or without."""
    guard = protection(kind, job(clients(**privacy)))
    return flat(guard.privatize(1, updates, model, {})[0].delta) * COHORT


def a_client_moves_the_sum_by_the_clipping_norm() -> None:
    detectors.check_sensitivity(
        lambda updates: central(Quiet, updates, MODEL), people(MODEL), list(adversaries(MODEL)), C
    )


def noise_at_the_server_does_not_depend_on_who_answers() -> None:
    for answered in (10, 7, 5, 1, 0):
        updates = [Update(f"c{i}", 1, dict(WIDE), 1) for i in range(answered)]
        detectors.check_noise(central(CentralDp, updates, WIDE), Z * C)


def noise_at_the_server_is_fresh() -> None:
    model: Tensors = {"u": torch.zeros(40_000), "v": torch.zeros(40_000)}
    setting, found = job(clients()), []
    for guard in (protection(CentralDp, setting), protection(CentralDp, setting)):
        for round in (1, 2):
            delta = guard.privatize(round, [], model, {})[0].delta
            found += [flat({"u": delta["u"]}), flat({"v": delta["v"]})]
    detectors.check_independence(found)


def the_servers_ledger_has_every_release() -> None:
    for setting in (job(clients()), poisson_job()):
        rate = setting.federation.cohort_rate or 1.0
        with tempfile.TemporaryDirectory() as folder:
            for times in (1, 2):  # the second is a server started anew
                guard = protection(CentralDp, setting, Path(folder))
                for round in (1, 2, 2):  # a round that was lost is released again
                    guard.privatize(round, [], MODEL, {})
                real = {Release(Z, rate): 3 * times}
                detectors.check_ledger(guard.spent, real)
                detectors.check_ledger(Ledger.open(guard.ledgers.path, "test").spent, real)


def poisson_job(number: int = 200) -> Job:
    federation = {"clients": number, "cohort_rate": RATE, "rounds": 50}
    return job(clients(delta=1e-4), federation=federation)


def cohorts_are_what_they_are_charged_as() -> None:
    fixed = job(clients(delta=1e-4), federation={"clients": 200, "cohort": 50, "rounds": 50})
    for setting in (poisson_job(), fixed):
        guard = protection(CentralDp, setting)
        drawn = [cohort(guard, setting, round) for round in range(1, 401)]
        charged = guard.dp_plan.event.sampling_rate
        if charged < 1:
            detectors.check_sampler(drawn, 200, charged)
            if cohort(protection(CentralDp, setting), setting, 1) == drawn[0]:
                raise Detected("anybody who has the job can tell the cohort")


def cohort(guard: CentralDp, setting: Job, round: int) -> list[int]:
    names = [f"{i:03d}" for i in range(200)]
    drawn = aggregation.sample(names, setting, round, guard.uniforms(round))
    return [int(name) for name in drawn]


@dataclass(frozen=True)
class Record:
    """One example, as it may come."""

    client: str
    features: torch.Tensor
    label: int


def records(count: int = 5, width: int = 7) -> list[Record]:
    draw = torch.Generator().manual_seed(2)
    return [Record(f"e{i}", torch.randn(width, generator=draw), i % 3) for i in range(count)]


def strange_records(width: int = 7) -> list[Record]:
    values = {"huge": 1e30, "large": 1e6, "nan": float("nan"), "inf": float("inf"), "zero": 0.0, "plain": 2.0}
    return [Record(name, torch.full((width,), value), 1) for name, value in values.items()]


def rows_of(count: int, client: str = "c") -> ClientRows:
    """A client that holds the first rows of a table."""
    return ClientRows(client, np.arange(count), np.arange(count, dtype=np.uint64))


def head(hidden: int | None) -> Tensors:
    draw = torch.Generator().manual_seed(3)
    if hidden is None:
        return {"head.bias": torch.zeros(3), "head.weight": torch.randn(3, 7, generator=draw)}
    return {
        "head.0.bias": torch.zeros(hidden), "head.0.weight": torch.randn(hidden, 7, generator=draw),
        "head.2.bias": torch.zeros(3), "head.2.weight": torch.randn(3, hidden, generator=draw),
    }  # fmt: skip


def everyone(setting: Job, words: Any = None) -> DpSgd:
    """The client's own protection, with noise of zero unless other words are given."""
    found = private_training(setting, terms_for(setting, "example"), 1, {})
    return replace(found, random_bits=words or (lambda client: silent))


def of_heads(given: Sequence[Record], hidden: int | None, *, distributed: bool) -> Vector:
    where = "distributed" if distributed else "client"
    setting = job(examples(sampling_rate=1.0, where=where))
    table = FeatureTable.of(torch.stack([r.features for r in given]), torch.tensor([r.label for r in given]))
    client_rows = [rows_of(len(given))]
    private, start = everyone(setting), head(hidden)
    if distributed:
        [(_, found)] = head_sums(start, table, client_rows, LOSSES["softmax"], private)
        return flat(found)
    local = HeadTrainingConfig(setting, LOSSES["softmax"], 1, per_example=private)
    return -flat(train_heads(start, table, client_rows, local)[0].delta) * 8.0  # the public divisor


def an_example_moves_a_heads_sum_by_the_clipping_norm() -> None:
    for hidden in (None, 6):
        for distributed in (False, True):
            total = partial(of_heads, hidden=hidden, distributed=distributed)
            detectors.check_sensitivity(total, records(), strange_records(), C)


def silence_of(client: str, steps: int, **train: Any) -> Vector:
    """What a client sends of a million numbers when no example was drawn: noise, times the divisor."""
    setting = job(
        examples(sampling_rate=1e-9, delta=1e-12, steps=steps), train={"lr": 1.0, "batch_size": 8} | train
    )
    start: Tensors = {"head.weight": torch.zeros(1000, 1000), "head.bias": torch.zeros(1000)}
    local = HeadTrainingConfig(
        setting,
        LOSSES["softmax"],
        1,
        per_example=private_training(setting, terms_for(setting, "example"), 1, {}),
    )
    table = FeatureTable.of(torch.ones(2, 1000), torch.tensor([0, 1]))
    return -flat(train_heads(start, table, [rows_of(2, client)], local)[0].delta) * 8.0


def noise_at_a_client_is_in_every_step_and_tensor() -> None:
    for steps in (1, 4):
        noise = silence_of("c", steps)
        detectors.check_noise(noise, Z * C * steps**0.5)
        if abs(float(noise[:1000].std()) / (Z * C * steps**0.5) - 1) > 0.15:  # the bias comes first
            raise Detected("the bias has other noise than the weights")


def noise_at_clients_is_fresh() -> None:
    detectors.check_independence([silence_of("a", 1), silence_of("a", 1), silence_of("b", 1)])


def examples_are_drawn_by_coins() -> None:
    for count in (200, 120):
        setting, numbers = job(examples()), np.arange(count, dtype=np.uint64)
        drawn = [
            private_training(setting, terms_for(setting, "example"), round, {}).draw("c", numbers)[0].tolist()  # type: ignore[misc]
            for round in range(1, 401)
        ]
        detectors.check_sampler(drawn, count, RATE)
        again = private_training(setting, terms_for(setting, "example"), 1, {}).draw("c", numbers)[0]  # type: ignore[misc]
        if again.tolist() == drawn[0]:
            raise Detected("anybody who has the job can tell the batches")


class NoShards:
    """Where a site has no data to read."""

    def fingerprint(self, job: Job, client: str) -> str:
        return "print"


def a_clients_ledger_has_every_release() -> None:
    setting = job(examples(steps=4))
    with tempfile.TemporaryDirectory() as folder:
        made = 0
        for _ in range(2):  # the second is a site started anew
            site = Site(cast(Any, NoShards()), ledgers=PrivacyLedgers(Path(folder)))
            for round in (1, 2, 2):  # a round that was lost is trained again
                request = TrainRequest(setting.canonical, setting.hash, round, {}, {}, run="run")
                charged_clients, _ = site.charge_privacy(setting, request, ["c"])
                assert charged_clients.private is not None and charged_clients.private.draw is not None
                made += len(charged_clients.private.draw("c", np.arange(10, dtype=np.uint64)))
                ledger = Ledger.open(Path(folder) / "c.jsonl", "example of c")
                detectors.check_ledger(ledger.spent, {Release(Z, RATE): made})
                if charged_clients.charged["c"] * 4 < made:
                    raise Detected(f"{made} releases, the server is told {charged_clients.charged['c'] * 4}")


def what_a_client_sends_beside_its_tensors_is_silent() -> None:
    def observed(given: Sequence[Record]) -> dict[str, Any]:
        setting = job(examples(seeded_noise=True))
        table = FeatureTable.of(
            torch.stack([r.features for r in given]), torch.tensor([r.label for r in given])
        )
        private = private_training(setting, terms_for(setting, "example"), 1, {"c": 1})
        local = HeadTrainingConfig(setting, LOSSES["softmax"], 1, per_example=private)
        update = train_heads(head(None), table, [rows_of(len(given))], local)[0]
        site = Site(cast(Any, Held(len(given))), ledgers=PrivacyLedgers(new_folder()))
        return {
            "weight": update.num_examples,
            "states": dict(update.states),
            "shapes": {n: str(t.shape) for n, t in update.delta.items()},
            "hello": [hello.num_examples for hello in site.hello(setting)],
        }

    detectors.check_silence(observed(records(5)), observed(records(9)))


class Held(NoShards):
    """A client of the built-in digits that holds so many."""

    def __init__(self, count: int) -> None:
        self.count = count

    def names(self, job: Job) -> list[str]:
        return ["c"]

    def dataset(self, job: Job, client: str) -> Any:
        return Dataset(pa.table({"label": ["1"] * self.count}))

    def counts(self, job: Job, client: str) -> list[Any]:
        return []


def what_the_server_tells_is_silent() -> None:
    """An update that isn't finite, or is huge, is screened, logged and counted like any other."""
    setting = job(clients())
    state = SimpleNamespace(
        round=1,
        bytes_up=0,
        bytes_down=0,
        tensors=MODEL,
        log=[],
        learner=SimpleNamespace(client_tensors={}, trained_in_round=lambda tensors, round: tensors),
        strategy_state={},
    )
    setup = SimpleNamespace(job=setting, test=None, population=["c0", "c1", "c2"])
    run = Run(cast(Any, setup), cast(Any, state))

    def observed(last: Update) -> dict[str, Any]:
        states = {n: torch.tensor(float(last.num_examples)) for n in ("train_loss.sum", "train_loss.count")}
        updates = [replace(u, client=f"c{i}", states=states) for i, u in enumerate([*people(MODEL, 2), last])]
        looked = Validation.of(setting)(updates, ["c0", "c1", "c2"], MODEL, 1)
        line = round_log.log_line(run, ["c0", "c1", "c2"], looked, evaluation.evaluate_global(run), {})
        return {"line": line, "clients": evaluation.evaluate_clients(run)}

    plain = observed(people(MODEL)[0])
    for odd in adversaries(MODEL):
        detectors.check_silence(plain, observed(replace(odd, num_examples=9)))


def shares_of_the_noise_make_the_whole() -> None:
    setting = job(clients(where="distributed"), federation={"clients": 6, "rounds": 3})
    dp_plan, numbers, clients_there = terms_for(setting, "client"), 1_000_000, 6
    threshold = secagg.least_threshold(clients_there)
    words = partial(np.random.default_rng(0).integers, 0, 2**64, dtype=np.uint64)
    total = np.zeros(numbers, dtype=np.uint64)
    for _ in range(threshold):  # the fewest with whom a sum is opened
        scale = secagg_encoding.FixedPointCodec.of(dp_plan, numbers, threshold, lambda count: words(count))
        total += scale.integers(np.zeros(numbers))
    detectors.check_noise(scale.values(total).numpy(), Z * C)


def masked_vectors_show_nothing_and_add_up() -> None:
    vectors = {name: np.arange(50_000, dtype=np.uint64) for name in "abcdef"}
    sent = []
    for context in (b"1", b"2"):
        persons = {name: secagg.Participant(name, context) for name in vectors}
        keys = {name: p.advertise() for name, p in persons.items()}
        dealt = {name: p.deal(keys, 5) for name, p in persons.items()}
        masked = {
            name: p.masked({o: dealt[o][name] for o in vectors if o != name}, vectors[name])
            for name, p in persons.items()
            if name != "a"
        }
        revealed = {name: persons[name].reveal(list(masked), {}) for name in masked}
        for shares in revealed.values():
            if shares["a"][:1] != secagg.OF_KEY or any(shares[n][:1] != secagg.OF_SEED for n in masked):
                raise Detected("the wrong share is revealed")
        total = secagg.unmask_sum(keys, list(dealt), masked, revealed, 5, context)
        if not np.array_equal(total, 5 * vectors["a"]):
            raise Detected("the sum is not that of the vectors")
        sent += [(v >> np.uint64(11)).astype(np.float64) for v in masked.values()]
    for vector in sent:
        mean, error = float(vector.mean()) / 2**53, 5 / (12 * len(vector)) ** 0.5
        if abs(mean - 0.5) > error or abs(float(vector.std()) / 2**53 * 12**0.5 - 1) > 0.02:
            raise Detected("a masked vector is not uniform")
    detectors.check_independence([*sent, np.arange(50_000, dtype=np.float64)])


@dataclass(frozen=True)
class Signer:
    """Signatures without keys: enough to see whether they are asked for."""

    name: str

    def knows(self, client: str) -> bool:
        return client in "abcdef"

    def sign(self, content: bytes) -> bytes:
        return hashlib.sha384(self.name.encode() + content).digest() * 2

    def has_signed(self, client: str, content: bytes, signature: bytes) -> bool:
        return self.knows(client) and signature == Signer(client).sign(content)


def a_lying_server_opens_no_vector() -> None:
    def persons() -> dict[str, secagg.Participant]:
        return {name: secagg.Participant(name, b"1", Signer(name), 6) for name in "abcdef"}

    def refuses(ask: Callable[[], Any]) -> None:
        try:
            ask()
        except secagg.SecureAggregationFailed:
            return
        raise Detected("a client works with a server that lies")

    people = persons()
    keys = {name: person.advertise() for name, person in people.items()}
    swapped = keys | {"f": secagg.Participant("f", b"1").advertise() + keys["f"][secagg.KEY_BYTES :]}
    refuses(lambda: people["a"].deal(swapped, 5))
    refuses(lambda: people["a"].deal({name: keys[name] for name in "abc"}, 3))
    refuses(lambda: people["a"].deal(keys | {"g": secagg.Participant("g", b"1").advertise()}, 5))
    people = persons()
    keys = {name: person.advertise() for name, person in people.items()}
    dealt = {name: person.deal(keys, 5) for name, person in people.items()}
    for name, person in people.items():
        person.masked({o: dealt[o][name] for o in people if o != name}, np.arange(3, dtype=np.uint64))
    signatures = {name: person.confirm("abcdef") for name, person in people.items()}
    refuses(lambda: people["b"].reveal("bcdef", {}))
    refuses(lambda: people["b"].reveal("abcdef", {name: signatures[name] for name in "abcd"}))
    refuses(lambda: people["b"].reveal("abcdef", dict.fromkeys("abcdef", signatures["a"])))
    people["b"].reveal("abcdef", signatures)


def a_model(layers: nn.Module) -> Any:
    """The little of a learner that private training looks at."""
    return SimpleNamespace(
        job=job(examples(), train={"lr": 1.0, "batch_size": 8}), model=layers,
        task=SimpleNamespace(loss=nn.functional.cross_entropy),
        objective=SimpleNamespace(loss=lambda shard: nn.functional.cross_entropy),
        backbone=SimpleNamespace(name="small"),
        batch=lambda shard, rows, varied=None: {"x": shard.table[rows]}, keep_states=lambda shard: None,
    )  # fmt: skip


class Small(nn.Module):
    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            self.first, self.last = nn.Linear(7, hidden), nn.Linear(hidden, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.relu(self.first(batch["x"])))
        return out


class Records:
    """A shard of records."""

    def __init__(self, given: Sequence[Record]) -> None:
        self.table = torch.stack([r.features for r in given])
        self.targets = torch.tensor([r.label for r in given])
        self.keys = tuple(hashlib.sha256(line.numpy().tobytes()).digest() for line in self.table)

    def __len__(self) -> int:
        return len(self.targets)

    def targets_of(self, rows: Sequence[int]) -> torch.Tensor:
        return self.targets[list(rows)]


def of_a_model(given: Sequence[Record], words: Any = None, learner: Any = None) -> Vector:
    learner = learner or a_model(Small())
    start = {n: torch.full_like(p.detach(), 0.3) for n, p in learner.model.named_parameters()}
    setting = job(examples(sampling_rate=1.0))
    private = everyone(setting, words)
    update = dp_sgd_model.train_privately(
        learner, start, cast(Any, Records(given)), private, client="c", round=1, plan={}
    )
    return -flat(update.delta) * 8.0


def an_example_moves_a_models_sum_by_the_clipping_norm() -> None:
    detectors.check_sensitivity(of_a_model, records(), strange_records(), C)


def noise_is_added_once_to_a_models_sum() -> None:
    """70 examples pass in three parts; over many trainings the variance is that of one noise."""
    given, found, learner = records(70), [], a_model(Small(hidden=90))
    quiet = of_a_model(given, learner=learner)
    for _ in range(30):
        found.append(of_a_model(given, lambda client: entropy, learner) - quiet)
    noise = np.concatenate(found)
    deviation = float(noise.std())
    if abs(deviation / (Z * C) - 1) > 5 / (2 * len(noise)) ** 0.5:
        raise Detected(f"the noise's deviation is {deviation:.4f}, must be {Z * C}")


def an_adaptive_norm_finds_the_norms_in_private() -> None:
    ones = [Update(f"c{i}", 1, {"w": torch.full((4,), 0.5)}, 1) for i in range(COHORT)]
    for start in (0.1, 10.0):
        setting = job(
            clients(clipping="adaptive", clipping_norm=start, count_deviation=0.8, seeded_noise=True)
        )
        guard, state = protection(CentralDp, setting), {}
        first = flat(
            protection(Quiet, setting)
            .privatize(
                1, [replace(ones[0], delta={"w": 1e3 * ones[0].delta["w"]})], {"w": torch.zeros(4)}, {}
            )[0]
            .delta
        )
        if abs(float(np.linalg.norm(first)) * COHORT - start) > 0.01 * start:
            raise Detected("the first round is clipped to another norm than the job's")
        late = []
        for round in range(1, 301):
            _, state = guard.privatize(round, ones, {"w": torch.zeros(4)}, state)
            late += [state[NORM]] if round > 100 else []
        if not 0.8 < float(np.median(late)) < 1.25:
            raise Detected(f"where all norms are 1 the norm is {np.median(late):.3f}")
    halves = [
        replace(u, delta={"w": size * u.delta["w"]}) for u, size in zip(ones, (0.1, 0.1, 9, 9), strict=True)
    ]
    setting = job(clients(clipping="adaptive", clipping_norm=1.0, count_deviation=0.8, clipping_lr=1.0))
    guard = protection(CentralDp, setting)
    moves = [np.log(guard.privatize(1, halves, {"w": torch.zeros(4)}, {})[1][NORM]) for _ in range(500)]
    if abs(float(np.std(moves)) / (0.8 / COHORT) - 1) > 0.2:
        raise Detected(f"the count behind the norm has noise of {np.std(moves) * COHORT:.3f}, must be 0.8")
    noise = central(CentralDp, [], WIDE, clipping="adaptive", count_deviation=0.8)
    detectors.check_noise(noise, C * (Z**-2 - 1.6**-2) ** -0.5)


def a_norm_of_examples_moves_in_private() -> None:
    """At a client: by a noised count that is paid for, and from the next step on."""
    count_noise, begin, batch = 0.8, 2.5, 8.0
    setting = job(examples(clipping="adaptive", clipping_lr=0.1, count_deviation=count_noise))

    def trained(clients: Sequence[str], words: Any = None, steps: int = 1) -> Sequence[Update]:
        private = private_training(setting, terms_for(setting, "example"), 1, {})
        assert private.adaptive is not None
        private = replace(
            private,
            random_bits=words or private.random_bits,
            draw=lambda client, numbers: [np.arange(len(numbers))] * steps,
            adaptive=replace(private.adaptive, begin=dict.fromkeys(clients, begin)),
        )
        table = FeatureTable.of(1e3 * torch.ones(1, 260), torch.tensor([0]))
        local = HeadTrainingConfig(setting, LOSSES["softmax"], 1, per_example=private)
        everybody = [ClientRows(client, np.arange(1), np.arange(1, dtype=np.uint64)) for client in clients]
        return train_heads({"head.weight": torch.zeros(10, 260), "head.bias": torch.zeros(10)}, table,
                           everybody, local)  # fmt: skip

    names = [f"c{i}" for i in range(400)]
    updates = trained(names)
    moves = np.log([float(update.states[SCALE]) / begin for update in updates])
    if abs(float(np.std(moves)) / (0.1 * count_noise / batch) - 1) > 0.2:
        raise Detected(
            f"an examples' count has noise of {np.std(moves) * batch / 0.1:.3f}, must be {count_noise}"
        )
    expected = -0.1 * (-0.5 / batch + 0.5 - 0.5)  # no gradient is within, of the eight that are expected
    if abs(float(np.mean(moves)) - expected) > 5 * 0.1 * count_noise / batch / len(names) ** 0.5:
        raise Detected(f"the norm moves by {np.mean(moves):.4f} where it should by {expected:.4f}")
    quiet = flat(trained(["c"], lambda client: silent)[0].delta) * batch
    if abs(float(np.linalg.norm(quiet)) - C * begin) > 0.001 * C * begin:
        raise Detected("a step's gradients are clipped to another norm than the one before it gives")
    left = (Z**-2 - (2 * count_noise) ** -2) ** -0.5
    noise = np.concatenate([flat(update.delta) * batch - quiet for update in updates])
    detectors.check_noise(noise, left * C * begin)


BANDS, TURNS = 3, {"clients": 12, "cohort": 4, "rounds": 50}
MADE_AGAIN = (1, 2, 3, 3, 4, 5)
"""Rounds as a banded run releases them: the server dies after its third, whose checkpoint is lost."""


def banded_job() -> Job:
    return job(clients(mechanism="banded", bands=BANDS), federation=TURNS)


def banded_rows(
    kind: type[CentralDp], model: Tensors, member: str | None = None
) -> tuple[list[Vector], CentralDp]:
    """What the noise was added to, of each release, by an inverse of the released rows; and who kept watch.

    The member sends as much as is allowed in every round that it is drawn for.
    """
    setting, folder, names = banded_job(), new_folder(), [f"c{i:02d}" for i in range(TURNS["clients"])]
    column = binom(2 * np.arange(BANDS), np.arange(BANDS)) / 4.0 ** np.arange(BANDS)
    column /= np.linalg.norm(column)
    guard, state, before, rows = protection(kind, setting, folder), {}, [], []
    released: list[Vector] = []
    for place, round in enumerate(MADE_AGAIN):
        if MADE_AGAIN[place - 1 : place] == (round,):
            guard, released = protection(kind, setting, folder), before
            guard.resume(state)
        before, state = released, guard.state
        drawn = member in aggregation.sample(names, setting, round, guard.uniforms(round))
        large = Update("member", round, {n: torch.full_like(t, 1e3) for n, t in model.items()}, 1)
        released = [flat(guard.privatize(round, [large] if drawn else [], model, {})[0].delta), *released]
        rows.append(sum(c * row for c, row in zip(column, released, strict=False)) * COHORT)
    return rows, guard


def banded_noise_is_that_of_the_matrix() -> None:
    rows, _ = banded_rows(CentralDp, {"w": torch.zeros(170_000)})
    detectors.check_noise(np.concatenate(rows), Z * C)
    for row in rows:
        if not abs(float(row.std()) / (Z * C) - 1) <= 0.01:
            raise Detected(f"a round's noise has deviation {row.std():.4g}, must be {Z * C:.4g}")
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    if float(np.abs(correlation).max()) > 6 / len(rows[0]) ** 0.5:
        raise Detected("what the matrix makes of a round's noise depends on another round's")


def a_client_moves_banded_releases_by_what_was_charged() -> None:
    quiet = np.concatenate(banded_rows(Quiet, MODEL)[0])
    for client in range(TURNS["clients"]):
        rows, guard = banded_rows(Quiet, MODEL, f"c{client:02d}")
        moved = float(np.linalg.norm(np.concatenate(rows) - quiet))
        paid = C * Z * sum(n / r.noise_multiplier**2 for r, n in guard.spent.items()) ** 0.5
        if moved > paid * (1 + detectors.SLACK):
            raise Detected(f"a client moves the releases by {moved:.4g}, charged are {paid:.4g}")


def a_clients_rounds_lie_bands_apart() -> None:
    setting, names = banded_job(), [f"c{i:02d}" for i in range(TURNS["clients"])]
    drawn = [set(aggregation.sample(names, setting, round, None)) for round in range(1, 51)]
    for round, cohort in enumerate(drawn):
        if any(cohort & other for other in drawn[max(0, round - BANDS + 1) : round]):
            raise Detected(f"a client takes part twice in {BANDS} rounds")
    if set().union(*drawn) != set(names):
        raise Detected("some clients never take part")


def releases_are_on_the_lattice() -> None:
    released = central(CentralDp, people(MODEL), MODEL)
    deviation = Z * C
    detectors.check_lattice(released, 2.0 ** (int(np.floor(np.log2(deviation))) - 28))
    if len(np.unique(released)) < len(released):
        raise Detected("the lattice is so coarse that numbers meet")


TRUTH = [
    (1.0, 0.01, 1000, 1e-5, 1.82824), (0.8, 0.1, 100, 1e-5, 10.97638), (1.0, 1.0, 1, 1e-5, 4.37718),
    (1.0, 0.1, 100, 1e-3, 4.78435), (1.0, 0.5, 1, 0.5, 0.0), (1.0, 0.1, 100, 1e-5, 7.0466),
    (1.0, 1e-5, 100_000, 1e-6, 0.01313),
]  # fmt: skip


def epsilon_is_true() -> None:
    for noise, rate, count, delta, true in TRUTH:
        found = accounting.epsilon({Release(noise, rate): count}, delta)
        if not true - 1e-4 <= found <= true * 1.005 + 0.011:
            raise Detected(f"epsilon is {found}, must be {true}")
    kinds = {Release(1.0, 0.1): 100, Release(0.8, 0.1): 50}
    alone = max(accounting.epsilon({kind: count}, 1e-5) for kind, count in kinds.items())
    if accounting.epsilon(kinds, 1e-5) <= 1.01 * alone:
        raise Detected("releases of two kinds cost no more than those of one")


def nothing_is_released_above_the_target() -> None:
    setting = job(clients(epsilon=6.0, noise_multiplier=None), federation={"clients": COHORT, "rounds": 4})
    guard = protection(CentralDp, setting)
    try:
        for round in range(1, 9):
            guard.privatize(round, [], MODEL, {})
    except BudgetExhausted:
        pass
    real = accounting.epsilon({guard.dp_plan.event: sum(guard.observed.values())}, 1e-3)
    if real > 6.0:
        raise Detected(f"epsilon {real:.3f} was released, the target is 6")


REFUSED = [
    (clients(delta=0.3), {}), (clients(), {"strategy": {"name": "flwr:FedMedian"}}),
    (clients(), {"evaluate": {"baselines": ["pooled"]}}), (examples(delta=0.2), {}),
    (clients(where="distributed"), {"federation": {"clients": 2, "rounds": 1}}),
    (examples(where="distributed", steps=4), {}),
]  # fmt: skip


def promises_that_cannot_be_kept_are_refused() -> None:
    for privacy, tables in REFUSED:
        try:
            job(privacy, **tables)
        except ConfigError:
            continue
        raise Detected(f"{privacy} with {tables} was accepted")
    from atoll.tasks import task_named

    try:
        check_fits(job(clients(), data={"source": "/data/mine"}), task_named("image-classification"))
    except ConfigError:
        return
    raise Detected("a class list is made from the clients' data")


def layers_that_mix_examples_are_found() -> None:
    batch = {"x": torch.randn(4, 7, generator=torch.Generator().manual_seed(5))}
    for layer in (nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False)):
        model = Small()
        model.last = nn.Sequential(layer, model.last)  # type: ignore[assignment]
        if mixing_layers(model, batch) != ["last.0"]:
            raise Detected("a layer that mixes examples is taken for one that doesn't")


def simulated_scores(family: Family, noise: float, generator: np.random.Generator) -> tuple[Any, Any]:
    """(scores, which are inside) of 300 canaries of a mechanism that is just what its family says."""
    inside = generator.random(300) < 0.5
    times = generator.binomial(family.releases, family.sampling_rate, 300)
    return inside * times + noise * np.sqrt(family.releases) * generator.standard_normal(300), inside


def a_bound_by_sums_is_seldom_above_the_truth() -> None:
    """At 95 %, in 5 of 100 runs; more than five deviations above that are too many."""
    generator, most = np.random.default_rng(13), 5 + 5 * (100 * 0.05 * 0.95) ** 0.5
    plain, sampled, wrong, refuted = Family(1.0, 9), Family(0.25, 100), 0, 0
    for _ in range(100):
        scores, inside = simulated_scores(plain, 1.8, generator)
        bound = gaussian_sums.lower_bound_by_sums(scores, inside, plain, delta=1e-5, confidence=0.95)
        wrong += bound.noise_multiplier is not None and bound.noise_multiplier < 1.8
        found = gaussian_sums.separation(*simulated_scores(sampled, 1.7, generator))
        refuted += gaussian_sums.chance(found, sampled, 1.7) < 0.05
    if max(wrong, refuted) > most:
        raise Detected(f"{wrong} of 100 bounds at 95 % are above the truth, and {refuted} with sampling")


def a_canarys_score_does_not_know_its_own_coin() -> None:
    """The attacker may know of all canaries but one: that one's score stays if its coin is turned over."""
    setting = job(examples())
    learner = fresh_learner(setting, Population.of(setting))
    canaries = CanaryFeatures.of(Population.of(setting), learner, 80)
    generator = torch.Generator().manual_seed(2)
    head = {name: torch.randn(t.shape, generator=generator) for name, t in learner.initial().items()}
    updates = [Update(name, 1, head, num_examples=1) for name in sorted(set(canaries.owner.tolist()))]
    inside = np.arange(80) % 3 == 0
    scores = canaries.scores(RoundTranscript(head, head, updates), inside)
    for place in range(80):
        turned = inside ^ (np.arange(80) == place)
        again = canaries.scores(RoundTranscript(head, head, updates), turned)
        if abs(again[place] - scores[place]) > 1e-3 * canaries._expected_length:
            raise Detected(f"the score of canary {place} depends on its own coin")


CHECKS: list[Callable[[], None]] = [
    a_client_moves_the_sum_by_the_clipping_norm,
    noise_at_the_server_does_not_depend_on_who_answers,
    noise_at_the_server_is_fresh,
    the_servers_ledger_has_every_release,
    cohorts_are_what_they_are_charged_as,
    an_example_moves_a_heads_sum_by_the_clipping_norm,
    noise_at_a_client_is_in_every_step_and_tensor,
    noise_at_clients_is_fresh,
    examples_are_drawn_by_coins,
    a_clients_ledger_has_every_release,
    what_a_client_sends_beside_its_tensors_is_silent,
    what_the_server_tells_is_silent,
    shares_of_the_noise_make_the_whole,
    masked_vectors_show_nothing_and_add_up,
    a_lying_server_opens_no_vector,
    an_example_moves_a_models_sum_by_the_clipping_norm,
    noise_is_added_once_to_a_models_sum,
    an_adaptive_norm_finds_the_norms_in_private,
    a_norm_of_examples_moves_in_private,
    banded_noise_is_that_of_the_matrix,
    a_client_moves_banded_releases_by_what_was_charged,
    a_clients_rounds_lie_bands_apart,
    releases_are_on_the_lattice,
    epsilon_is_true,
    nothing_is_released_above_the_target,
    promises_that_cannot_be_kept_are_refused,
    layers_that_mix_examples_are_found,
    a_bound_by_sums_is_seldom_above_the_truth,
    a_canarys_score_does_not_know_its_own_coin,
]
