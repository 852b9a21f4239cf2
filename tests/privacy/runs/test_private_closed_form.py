"""Closed-form heads under a promise: what one unit moves, the noise on all of it, the charge before it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import atoll.client.dp.ledgers
import atoll.client.heads.statistics
import atoll.client.site
import atoll.privacy.central
import atoll.server.rounds.central_dp
import atoll.server.rounds.closed_form
import atoll.strategies.private_closed_form
from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.dp.poisson import private_training
from atoll.client.heads import statistics as client_statistics
from atoll.client.site import Site
from atoll.errors import BudgetExhausted, ConfigError
from atoll.job.job import Job
from atoll.privacy.accounting import Release
from atoll.privacy.ledger import Ledger
from atoll.privacy.noise import seeded
from atoll.protocol.messages import CHARGED_ROUNDS, Failure
from atoll.protocol.requests import StatisticsRequest, TrainRequest
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.central_dp import CentralDp, LedgerLocation
from atoll.server.rounds.closed_form import validate_statistics
from atoll.sim.population.population import Population
from atoll.strategies import closed_form
from atoll.strategies import private_closed_form as moments
from tests.privacy import detectors
from tests.privacy.detectors import Detected, silent
from tests.privacy.watchdogs import new_folder, terms_for
from tests.sim.test_simulation import DIGITS, run

KINDS = ("ridge", "prototype", "gaussian")
Vector = NDArray[np.float64]
NORM, Z, CLASSES = 2.0, 1.3, 3
LEDGER = "ledger.jsonl"


def job(unit: str = "example", kind: str = "ridge", *, privacy: Any = None, **tables: Any) -> Job:
    wanted: dict[str, Any] = {
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "tune": {"head_init": kind, "feature_norm": NORM},
        "federation": {"clients": 6, "rounds": 1},
        "privacy": {"unit": unit, "noise_multiplier": Z, "delta": 1e-3} | (privacy or {}),
    }
    return Job.parse(DIGITS | wanted | tables, origin="test")


def learner_of(setting: Job, width: int = 7) -> Any:
    """Stands in for a learner whose features are the shard's own."""
    facts = {"classes": [str(k) for k in range(CLASSES)]}
    return SimpleNamespace(
        job=setting, data_info=facts, features=SimpleNamespace(plain=lambda shard: shard.rows)
    )


class Held:
    """A shard of features and classes."""

    def __init__(self, rows: torch.Tensor, table: torch.Tensor) -> None:
        self.rows, self.table = rows, table

    def __len__(self) -> int:
        return len(self.rows)


Record = tuple[str, torch.Tensor, int]


def held(records: Sequence[Record], width: int = 7) -> Any:
    rows = torch.stack([row for _, row, _ in records]) if records else torch.empty(0, width)
    return Held(rows, torch.tensor([k for *_, k in records], dtype=torch.int64))


def people(count: int = 6, width: int = 7) -> list[Record]:
    draw = torch.Generator().manual_seed(2)
    return [(f"e{i}", torch.randn(width, generator=draw) * 2.0 ** (i - 2), i % CLASSES) for i in range(count)]


def strange(width: int = 7) -> list[Record]:
    values = {
        "huge": 1e30,
        "large": 1e6,
        "nan": math.nan,
        "inf": math.inf,
        "minus inf": -math.inf,
        "zero": 0.0,
    }
    rows = [(name, torch.full((width,), value), 1) for name, value in values.items()]
    partly = torch.ones(width)
    partly[2] = math.nan
    along = torch.zeros(width)
    along[3] = NORM
    return [
        *rows,
        ("one number is nan", partly, 0),
        ("along an axis", along, 2),
        *people()[:1],
        *people()[-1:],
    ]


def flat(tensors: Tensors) -> Vector:
    return torch.cat(
        [tensors[n].reshape(-1).double() for n in sorted(tensors) if n != CHARGED_ROUNDS]
    ).numpy()


def sent(setting: Job, records: Sequence[Record], words: Any = None) -> Vector:
    """What a client sends of those examples; with noise of zero unless other words are given."""
    private = None
    if "example" in setting.privacy.units:
        plan = private_training(setting, terms_for(setting, "example"), 1, {"c": 1})
        private = replace(plan, random_bits=lambda client: words or silent)
    [reply] = client_statistics.statistics(learner_of(setting), 1, {"c": held(records)}, private)
    return flat(reply.states)


# Checks, each of which a planted bug below turns red


def an_example_moves_the_sums_by_the_sensitivity() -> None:
    for kind in KINDS:
        setting = job(kind=kind)
        detectors.check_sensitivity(
            lambda given, setting=setting: sent(setting, given), people(), strange(), math.sqrt(2)
        )


def a_client_moves_the_sums_by_the_sensitivity() -> None:
    setting = job("client")
    form = {"moments": torch.zeros(36), "sums": torch.zeros(CLASSES, 8)}
    given = {name: client_statistics_of(name, setting) for name in ("a", "b", "c")}
    hostile = {
        "huge": {n: torch.full_like(t, 1e30) for n, t in form.items()},
        "nan": {n: torch.full_like(t, math.nan) for n, t in form.items()},
        "in one block": {"moments": form["moments"] + 9, "sums": form["sums"]},
        "in the other": {"moments": form["moments"], "sums": form["sums"] - 9},
    }
    everyone = given | {n: {k: t.double() for k, t in s.items()} for n, s in hostile.items()}

    def total(names: Sequence[str]) -> Vector:
        guard = protection(setting, Quiet)
        chosen = {name: everyone[name] for name in names}
        return flat(guard.privatize_statistics(1, chosen, form, moments.SENSITIVITY))

    detectors.check_sensitivity(total, list(given), list(hostile), math.sqrt(2))


def client_statistics_of(name: str, setting: Job) -> Tensors:
    shard = held([(name, 3 * row, k) for _, row, k in people(4 + len(name))])
    [reply] = client_statistics.statistics(learner_of(setting), 1, {name: shard})
    return reply.states


class Quiet(CentralDp):
    def _random_bits_of(self, purpose: str, round: int) -> Any:
        return silent


def protection(setting: Job, kind: type[CentralDp] = CentralDp, folder: Path | None = None) -> CentralDp:
    where = LedgerLocation((folder or new_folder()) / LEDGER, "test")
    return kind(setting, terms_for(setting, "client"), where, "run")


def noise_of_a_client(words: Any) -> dict[str, Vector]:
    """What a client without examples sends, block by block."""
    setting = job()
    private = private_training(setting, terms_for(setting, "example"), 1, {"c": 1})
    learner = learner_of(setting)
    learner.data_info = {"classes": [str(k) for k in range(1000)]}
    empty = held([], width=1100)
    private = replace(private, random_bits=lambda client: words)
    [reply] = client_statistics.statistics(learner, 1, {"c": empty}, private)
    return {name: flat({name: reply.states[name]}) for name in ("moments", "sums")}


def noise_is_on_every_block_of_a_client() -> None:
    blocks = noise_of_a_client(seeded(1))
    detectors.check_noise(blocks["sums"], Z * math.sqrt(2))
    found = float(blocks["moments"].std()) / (Z * math.sqrt(2))
    if abs(found - 1) > 0.01:
        raise Detected(f"the moments have {found:.3f} of the noise that they must have")
    detectors.check_independence([blocks["sums"], blocks["moments"]])


def noise_is_on_every_block_of_the_server() -> None:
    guard = protection(job("client", privacy={"seeded_noise": True}))
    form = {"moments": torch.zeros(500_000), "sums": torch.zeros(1000, 1100)}
    total = guard.privatize_statistics(1, {}, form, moments.SENSITIVITY)
    detectors.check_noise(flat({"sums": total["sums"]}), Z * math.sqrt(2))
    found = float(total["moments"].std()) / (Z * math.sqrt(2))
    if abs(found - 1) > 0.01:
        raise Detected(f"the moments have {found:.3f} of the noise that they must have")


class NoShards:
    """Data of which nothing is read but its fingerprint; what is read shows whether the charge was there."""

    def __init__(self, ledger: Path) -> None:
        self.ledger = ledger

    def fingerprint(self, job: Job, client: str) -> str:
        return "print"


def a_clients_charge_is_there_before_its_sums_leave() -> None:
    folder, setting = new_folder(), job()
    site = Site(cast(Any, NoShards(folder)), ledgers=PrivacyLedgers(folder))
    for times in (1, 2):  # a round whose sums were lost is answered and charged again, within the target
        request = StatisticsRequest(setting.canonical, setting.hash, 1, {}, run="run")
        charged, refused = site.charge_privacy(setting, request, ["c"])
        if refused or charged.private is None:
            raise Detected("a client doesn't answer")
        before = Ledger.open(folder / "c.jsonl", "example of c").spent
        detectors.check_ledger(before, {Release(charged.private.noise_multiplier, 1.0): times})
        if charged.charged["c"] != times:
            raise Detected(f"charged {times} times, the server is told {charged.charged['c']}")


def the_servers_charge_is_there_before_its_noise_is_drawn() -> None:
    folder = new_folder()

    class Watching(CentralDp):
        def _random_bits_of(self, purpose: str, round: int) -> Any:
            def words(count: int) -> Any:
                spent = Ledger.open(folder / LEDGER, "test").spent
                detectors.check_ledger(spent, {Release(Z, 1.0): 1})
                return silent(count)

            return words

    guard = protection(job("client"), Watching, folder)
    form = {"moments": torch.zeros(3), "sums": torch.zeros(2, 2)}
    guard.privatize_statistics(1, {}, form, moments.SENSITIVITY)
    detectors.check_ledger(guard.spent, {Release(Z, 1.0): 1})


def nothing_is_said_beside_the_sums() -> None:
    told = []
    for records in (people(3), people(6)):
        for unit in ("example", "client"):
            setting = job(unit)
            private = None
            if unit == "example":
                private = private_training(setting, terms_for(setting, "example"), 1, {"c": 1})
            [reply] = client_statistics.statistics(learner_of(setting), 1, {"c": held(records)}, private)
            shapes = {name: str(t.shape) for name, t in reply.states.items()}
            told.append([reply.num_examples, shapes, reply.states.get(CHARGED_ROUNDS, 0)])
    detectors.check_silence(told[:2], told[2:])


CHECKS: tuple[Callable[[], None], ...] = (
    an_example_moves_the_sums_by_the_sensitivity,
    a_client_moves_the_sums_by_the_sensitivity,
    noise_is_on_every_block_of_a_client,
    noise_is_on_every_block_of_the_server,
    a_clients_charge_is_there_before_its_sums_leave,
    the_servers_charge_is_there_before_its_noise_is_drawn,
    nothing_is_said_beside_the_sums,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_code_as_it_is_passes(check: Callable[[], None]) -> None:
    check()


# Planted bugs


def z_as(change: Callable[[torch.Tensor, float], torch.Tensor]) -> Any:
    return (moments, "bounded", lambda original: lambda features, norm: change(features, norm))


def unclipped(features: torch.Tensor, norm: float) -> torch.Tensor:
    x = torch.nan_to_num(features.double()) / norm * moments.SCALE
    return torch.cat([x, torch.full((len(x), 1), moments.BIAS, dtype=torch.float64)], 1)


def with_a_bias_of_one(features: torch.Tensor, norm: float) -> torch.Tensor:
    x = features.double() / norm
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1)
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)


def clipped_by_number(features: torch.Tensor, norm: float) -> torch.Tensor:
    x = (features.double() / norm).clamp(-1, 1) * moments.SCALE
    return torch.cat([x, torch.full((len(x), 1), moments.BIAS, dtype=torch.float64)], 1)


def of_one_block(kept: str) -> Any:
    def make(original: Any) -> Any:
        def noised(total: Tensors, noise_multiplier: float, words: Any) -> Tensors:
            return original(total, noise_multiplier, words) | {kept: total[kept]}

        return noised

    return (client_statistics, "noised_sums", make)


def by_the_server_without(kept: str) -> Any:
    def make(original: Any) -> Any:
        def release(self: Any, updates: Any, model: Any) -> Any:
            mean, told = original(self, updates, model)
            return mean | {kept: torch.zeros_like(mean[kept])}, told

        return release

    return (atoll.privacy.central.CentralGaussian, "release", make)


def charged_afterwards(original: Any) -> Any:
    def release(self: Any, updates: Any, model: Any) -> Any:
        found = original(replace(self, record=lambda cost: None), updates, model)
        self.record(self.event)
        return found

    return release


def whole_matrix(matrix: torch.Tensor) -> torch.Tensor:
    return matrix[tuple(torch.triu_indices(len(matrix), len(matrix)))] * 2


BUGS: dict[str, tuple[Callable[[], None], tuple[Any, str, Callable[[Any], Any]]]] = {
    "features aren't clipped": (CHECKS[0], z_as(unclipped)),
    "features are clipped number by number": (CHECKS[0], z_as(clipped_by_number)),
    "the bias isn't in the bound": (CHECKS[0], z_as(with_a_bias_of_one)),
    "off the diagonal times two": (CHECKS[0], (moments, "upper_triangle", lambda original: whole_matrix)),
    "what is not finite is counted": (
        CHECKS[0], (torch, "isfinite", lambda original: lambda t: torch.ones_like(t, dtype=torch.bool)),
    ),
    "clients are clipped to ten times the sensitivity": (
        CHECKS[1],
        (
            atoll.privacy.central, "clipped_sum",
            lambda original: lambda updates, clipping_norm: original(
                updates, clipping_norm=10 * clipping_norm
            ),
        ),
    ),
    "noise for a sensitivity of one": (CHECKS[2], (client_statistics, "SENSITIVITY", lambda original: 1.0)),
    "the moments travel without noise": (CHECKS[2], of_one_block("moments")),
    "the sums travel without noise": (CHECKS[2], of_one_block("sums")),
    "the server leaves the moments without noise": (CHECKS[3], by_the_server_without("moments")),
    "the server leaves the sums without noise": (CHECKS[3], by_the_server_without("sums")),
    "the server's noise is for a sensitivity of one": (
        CHECKS[3],
        (CentralDp, "_mechanism", lambda original: lambda self, round, norm: original(self, round, 1.0)),
    ),
    "a client isn't charged": (
        CHECKS[4], (PrivacyLedgers, "charge", lambda original: lambda self, *given: 1),
    ),
    "a client is charged for what was not sampled": (
        CHECKS[4],
        (
            atoll.client.dp.ledgers, "Entry",
            lambda original: lambda job, round, unit, release, count, data: original(
                job, round, unit, Release(release.noise_multiplier, 0.1), count, data
            ),
        ),
    ),
    "the server charges after its release": (
        CHECKS[5], (atoll.privacy.central.CentralGaussian, "release", charged_afterwards),
    ),
    "a client says how many examples it has": (
        CHECKS[6],
        (
            client_statistics, "Measurement",
            lambda original: lambda name, round, one, states: original(
                name, round, int(states["sums"].abs().sum() * 1000), states
            ),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, (owner, name, make) = BUGS[bug]
    monkeypatch.setattr(owner, name, make(getattr(owner, name)))
    with pytest.raises(Detected):
        check()


def test_every_check_has_a_bug() -> None:
    assert {check for check, _ in BUGS.values()} == set(CHECKS)


# Heads of noised sums


def data(count: int = 90, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    targets = torch.arange(count) % CLASSES
    features = torch.randn(count, width, generator=draw) + 2 * torch.eye(CLASSES, width)[targets] + 1
    return features, targets


def test_a_triangle_has_the_matrix_norm_and_gives_it_back() -> None:
    draw = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).double()
    matrix = draw @ draw.T
    triangle = moments.upper_triangle(matrix)
    assert torch.allclose(triangle.norm(), matrix.norm()) and len(triangle) == 45
    assert torch.allclose(moments.symmetric(triangle, 9), matrix)


def test_one_example_can_move_the_sums_by_all_of_the_sensitivity() -> None:
    total = moments.bounded_sums("ridge", torch.full((1, 4), 50.0), torch.tensor([1]), CLASSES, NORM)
    assert math.isclose(float(np.linalg.norm(flat(total))), moments.SENSITIVITY, rel_tol=1e-6)


def test_without_noise_a_ridge_head_is_that_of_least_squares_on_clipped_features() -> None:
    features, targets = data()
    total = moments.bounded_sums("ridge", features, targets, CLASSES, NORM)
    head = moments.noised_head("ridge", total, 0.0, NORM, 0.5)
    x = features.double().numpy()
    x *= np.minimum(1, NORM / np.linalg.norm(x, axis=1, keepdims=True))
    z = np.hstack([x * moments.SCALE / NORM, np.full((len(x), 1), moments.BIAS)])
    cost = 0.5 * len(x) * z[:, :-1].var(0).mean()
    solved = np.linalg.lstsq(
        np.vstack([z, math.sqrt(cost) * np.eye(9)]),
        np.vstack([np.eye(CLASSES)[targets], np.zeros((9, CLASSES))]), rcond=None,
    )[0]  # fmt: skip
    outputs = x @ head["head.weight"].double().numpy().T + head["head.bias"].double().numpy()
    assert np.allclose(outputs, z @ solved, atol=1e-5)


@pytest.mark.parametrize("kind", ["prototype", "gaussian"])
def test_without_noise_classes_are_those_of_clipped_features(kind: str) -> None:
    features, targets = data()
    total = moments.bounded_sums(kind, features, targets, CLASSES, NORM)
    found = moments.noised_head(kind, total, 0.0, NORM, 1.0)
    x = features.double()
    x = x * (NORM / x.norm(dim=1, keepdim=True)).clamp_max(1)
    plain = closed_form.head_of(kind, closed_form.STATISTICS[kind](x, targets, CLASSES), 1.0)
    for name, tensor in plain.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_ridge_is_adassps_with_tropps_bound_on_this_noise() -> None:
    """The bound holds for noise of this kind, and isn't far off."""
    width, deviation, draw = 40, 0.7, torch.Generator().manual_seed(4)
    bound = moments.noise_bound(width, deviation)
    assert math.isclose(bound, 0.7 * math.sqrt(41 * math.log(80 / 0.05)))
    norms = []
    for _ in range(50):
        noise = torch.randn(width * (width + 1) // 2, generator=draw, dtype=torch.float64) * deviation
        norms.append(float(torch.linalg.matrix_norm(moments.symmetric(noise, width), 2)))
    assert bound / 3 < max(norms) < bound
    assert math.isclose(moments.adaptive_ridge(torch.zeros(width, width).double(), deviation), bound)
    identity = torch.eye(width, dtype=torch.float64)
    assert math.isclose(moments.adaptive_ridge(1.5 * bound * identity, deviation), 0.5 * bound)
    assert moments.adaptive_ridge(2.5 * bound * identity, deviation) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deviation", [0.1, 30.0])
def test_heads_of_sums_that_noise_has_made_impossible_are_finite(kind: str, deviation: float) -> None:
    shapes = moments.moment_shapes(kind, CLASSES, 8)
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        total = {n: torch.randn(s, generator=draw).double() * deviation for n, s in shapes.items()}
        head = moments.noised_head(kind, total, deviation, NORM, 1.0)
        assert all(bool(torch.isfinite(t).all()) for t in head.values())


# Whole runs


def epsilon_of_dp_accounting(noise: float, rate: float, releases: int) -> float:
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    event = dp_event.GaussianDpEvent(noise)
    accountant = PLDAccountant()
    accountant.compose(event if rate == 1 else dp_event.PoissonSampledDpEvent(rate, event), releases)
    return float(accountant.get_epsilon(1e-3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_run_is_charged_what_dp_accounting_says_of_its_noise_in_every_engine(
    tmp_path: Path, unit: str, kind: str
) -> None:
    setting = job(unit, kind, privacy={"seeded_noise": True})
    engines: tuple[dict[str, Any], ...] = ({}, {"engine": "loop"}, {"workers": 2})
    results = [run(setting, tmp_path / str(n), **options) for n, options in enumerate(engines)]
    assert len({r.model_sha256 for r in results}) == 1
    for number, result in enumerate(results):
        privacy = result.privacy
        assert math.isclose(privacy["epsilon"], epsilon_of_dp_accounting(Z, 1.0, 1), rel_tol=2e-3)
        assert (privacy["releases"], privacy["noise_multiplier"]) == (1, Z)
        assert result.rounds[0]["loss"] is None and result.final["clients"] == {}
        assert privacy["sums_of_features"] == {"feature_norm": NORM, "sensitivity": math.sqrt(2)}
        folder = tmp_path / str(number)
        ledgers = [folder / LEDGER] if unit == "client" else sorted((folder / "ledgers").glob("*.jsonl"))
        assert len(ledgers) == (1 if unit == "client" else 6)
        for path in ledgers:
            owner = setting.hash if unit == "client" else f"example of {path.stem}"
            assert Ledger.open(path, owner, durable=False).spent == Counter({Release(Z, 1.0): 1})


def test_later_rounds_of_clients_are_releases_of_the_same_kind(tmp_path: Path) -> None:
    rounds = {"clients": 6, "rounds": 3, "cohort": None, "cohort_rate": 0.5}
    setting = job("client", federation=rounds)
    result = run(setting, tmp_path / "run")
    assert math.isclose(result.privacy["epsilon"], epsilon_of_dp_accounting(Z, 0.5, 3), rel_tol=2e-3)
    assert Ledger.open(tmp_path / "run" / LEDGER, setting.hash).spent == Counter({Release(Z, 0.5): 3})


def test_noise_that_is_too_little_to_matter_gives_a_head_that_decides_well(tmp_path: Path) -> None:
    small = {"noise_multiplier": 0.05, "seeded_noise": True}
    result = run(job(privacy=small, tune={"head_init": "ridge", "feature_norm": 4.0}), tmp_path / "run")
    assert result.final["server"]["accuracy"] > 0.75


def test_a_release_above_the_target_is_none(tmp_path: Path) -> None:
    setting = job("client", privacy={"noise_multiplier": None, "epsilon": 2.0})
    guard = protection(setting)
    form = {"moments": torch.zeros(3), "sums": torch.zeros(2, 2)}
    guard.privatize_statistics(1, {}, form, moments.SENSITIVITY)
    with pytest.raises(BudgetExhausted):
        guard.privatize_statistics(1, {}, form, moments.SENSITIVITY)


def test_a_site_sends_nothing_but_these_sums_of_examples_under_a_promise(tmp_path: Path) -> None:
    setting = job(data={"source": "digits", "classes": [str(k) for k in range(10)]})
    population = Population.of(setting)
    facts = population.roster(setting).data_info[0]
    site = Site(population, ledgers=PrivacyLedgers(tmp_path))
    request = TrainRequest(setting.canonical, setting.hash, 2, facts, {})
    [reply] = site.answer(request, ["client-0"])
    assert isinstance(reply, Failure) and "the sums for its head" in reply.reason
    assert not list(tmp_path.iterdir())


def test_values_of_clients_under_a_promise_are_no_reason_to_set_them_aside() -> None:
    from atoll.protocol.messages import Measurement

    setting = job("client")
    model = {"head.weight": torch.zeros(3, 7), "head.bias": torch.zeros(3)}
    shapes = moments.moment_shapes("ridge", 3, 7)
    states = {name: torch.full(shape, math.nan, dtype=torch.float64) for name, shape in shapes.items()}
    screened = validate_statistics([Measurement("a", 1, 1, states)], ["a"], setting, model)
    assert screened.num_valid == 1 and not screened.set_aside
    wrong = states | {"sums": torch.zeros(3, 3)}
    assert validate_statistics([Measurement("a", 1, 1, wrong)], ["a"], setting, model).num_valid == 0


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"tune": {"head_init": "ridge"}}, "tune.feature_norm: missing"),
        ({"federation": {"clients": 6, "rounds": 2}}, "federation.rounds: expected 1 .* found 2"),
        ({"privacy": {"sampling_rate": 0.1}}, "privacy.sampling_rate has no meaning with tune.head_init"),
        ({"privacy": {"steps": 1}}, "privacy.steps has no meaning with tune.head_init"),
        ({"privacy": {"clipping_norm": 0.5}}, "privacy.clipping_norm has no meaning with tune.head_init"),
        ({"privacy": {"where": "distributed"}}, "privacy.where: expected 'client' with tune.head_init"),
        ({"privacy": {"unit": "client", "where": "distributed"}}, "privacy.where: expected 'server' with"),
        ({"privacy": {"unit": "client", "clipping": "adaptive"}}, "privacy.clipping: expected 'fixed' with"),
        ({"privacy": {"audit": True}}, "privacy.audit: expected false with tune.head_init"),
        ({"tune": {"feature_norm": 1.0}}, "tune.feature_norm has no meaning without head_init"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        job(**tables)


def test_the_classes_are_the_jobs(tmp_path: Path) -> None:
    from atoll.server.job_checks import validate_for_deployment

    with pytest.raises(ConfigError, match=r"data\.classes: missing"):
        validate_for_deployment(job())
    validate_for_deployment(job(data={"source": "digits", "classes": [str(k) for k in range(10)]}))
