"""Correlated noise: its sensitivity, its covariance, cohorts that lie apart, and runs that are cut off."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import binom
from scipy.stats import norm

from atoll.errors import BudgetExhausted, ConfigError
from atoll.job.job import Job
from atoll.privacy.accounting import Release, epsilon, epsilon_rdp
from atoll.privacy.banded import (
    LEAST_SQUARE,
    CorrelatedNoise,
    coefficients,
    cost_of_round,
    sensitivity_of,
    squared_sensitivity,
)
from atoll.privacy.central import CentralGaussian
from atoll.privacy.clipping import clipped_sum
from atoll.privacy.dp_plan import dp_plan_of, planned_sensitivity
from atoll.privacy.noise import Lattice, lattice_for, seeded
from atoll.protocol.messages import Update
from atoll.report.run_result import RunResult
from atoll.server.events import Event, RoundEnded, ignore_events
from atoll.server.rounds.cohort import sample
from atoll.sim.engines.engine import simulate
from benchmarks.banded import errors, prefix_error
from tests.sim.test_simulation import DIGITS

Matrix = NDArray[np.float64]

BANDED: dict[str, Any] = {
    "unit": "client", "noise_multiplier": 0.7, "delta": 1e-3, "clipping_norm": 0.5,
    "mechanism": "banded", "bands": 3,
}  # fmt: skip
TURNS = {"clients": 6, "cohort": 2, "rounds": 7}


def job(privacy: dict[str, Any], **federation: Any) -> Job:
    return Job.parse(DIGITS | {"privacy": privacy, "federation": TURNS | federation}, origin="test")


def strategy_matrix(rounds: int, bands: int) -> Matrix:
    """C from its definition: the square root of the prefix sums' matrix, cut off; a column has norm 1."""
    column = np.array([binom(2 * k, k) / 4**k for k in range(bands)])
    column /= np.linalg.norm(column)
    matrix = np.zeros((rounds, rounds))
    for band in range(min(bands, rounds)):
        matrix += np.diag(np.full(rounds - band, column[band]), -band)
    return matrix


def allowed(rounds: int, bands: int) -> list[tuple[int, ...]]:
    """Every set of rounds (from 0) in which one client may take part."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(rounds), n) for n in range(1, rounds + 1)
    )
    return [s for s in subsets if all(b - a >= bands for a, b in itertools.pairwise(s))]


def slowly(releases: dict[int, int], bands: int) -> float:
    """The squared sensitivity by the matrix, over every allowed participation."""
    rounds = max(releases)
    matrix, counts = strategy_matrix(rounds, bands), np.array([releases.get(t + 1, 0) for t in range(rounds)])
    moved = (counts @ np.square(matrix[:, list(s)].sum(1)) for s in allowed(rounds, bands))
    return float(max(moved))


def test_the_uncut_coefficients_are_the_square_root_of_the_prefix_sums() -> None:
    rounds = 12
    root = strategy_matrix(rounds, rounds) / strategy_matrix(rounds, rounds)[0, 0]
    np.testing.assert_allclose(root @ root, np.tril(np.ones((rounds, rounds))), atol=1e-12)
    for bands in (1, 2, 5, 12):
        np.testing.assert_allclose(coefficients(bands), strategy_matrix(12, bands)[:bands, 0], rtol=1e-14)


@pytest.mark.parametrize("bands", [1, 2, 3, 5])
@pytest.mark.parametrize("rounds", [1, 2, 4, 7, 10])
def test_the_sensitivity_is_the_most_over_all_participations(rounds: int, bands: int) -> None:
    once = dict.fromkeys(range(1, rounds + 1), 1)
    assert squared_sensitivity(once, bands) == pytest.approx(slowly(once, bands), rel=1e-12)
    assert squared_sensitivity(once, bands) <= math.ceil(rounds / bands) * (1 + 1e-12)
    draw = np.random.default_rng(rounds * 10 + bands)
    for _ in range(10):  # rounds that were lost and released again, or not at all
        counts = draw.integers(0, 4, rounds)
        releases = {t + 1: int(n) for t, n in enumerate(counts) if n} or {1: 1}
        assert squared_sensitivity(releases, bands) == pytest.approx(slowly(releases, bands), rel=1e-12)


def test_costs_of_rounds_add_up_to_the_sensitivity_also_of_a_part_of_the_run() -> None:
    charged: Counter[int] = Counter()
    spent: Counter[Release] = Counter()
    for round in (1, 2, 3, 3, 4, 2, 3, 4, 5, 6, 7):
        spent[cost_of_round(charged, round, 1.3, 3)] += 1
        charged[round] += 1
        assert sensitivity_of(spent, 1.3) == pytest.approx(math.sqrt(slowly(charged, 3)), rel=1e-9)
    assert cost_of_round({}, 1, 1.3, 1) == Release(1.3, 1.0)
    assert cost_of_round({1: 1, 2: 2}, 3, 1.3, 1).noise_multiplier == pytest.approx(1.3)


@pytest.mark.parametrize("bands", [1, 2, 3])
@pytest.mark.parametrize(
    ("charged", "round"),
    [
        ({}, 1),
        ({}, 3),
        ({1: 1, 2: 1}, 3),
        ({1: 1, 2: 1}, 4),
        ({1: 1, 2: 1}, 1),
        ({1: 1, 2: 1, 3: 1}, 2),
        ({2: 1, 3: 1}, 4),
        ({3: 1}, 1),
    ],
)
def test_a_round_costs_what_it_adds_to_the_sensitivity_also_after_a_gap(
    charged: dict[int, int], round: int, bands: int
) -> None:
    after = {**charged, round: charged.get(round, 0) + 1}
    before = slowly(charged, bands) if charged else 0.0
    assert squared_sensitivity(charged, bands) == pytest.approx(before, rel=1e-12)
    cost = cost_of_round(charged, round, 1.3, bands)
    added = max(slowly(after, bands) - before, LEAST_SQUARE)
    assert (1.3 / cost.noise_multiplier) ** 2 == pytest.approx(added, rel=1e-9)


def gaussian_epsilon(multiplier: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: of one Gaussian release."""

    def excess(eps: float) -> float:
        half, part = 1 / (2 * multiplier), eps * multiplier
        return float(norm.cdf(half - part) - math.exp(eps) * norm.cdf(-half - part)) - delta

    return float(brentq(excess, 0, 300))


def test_epsilon_is_that_of_one_gaussian_release_of_the_sensitivity() -> None:
    from dp_accounting import GaussianDpEvent
    from dp_accounting.pld import PLDAccountant

    spent: Counter[Release] = Counter()
    for round in range(1, 12):
        spent[cost_of_round(dict.fromkeys(range(1, round), 1), round, 2.0, 4)] += 1
    single = 2.0 / math.sqrt(slowly(dict.fromkeys(range(1, 12), 1), 4))
    other = float(
        PLDAccountant(value_discretization_interval=1e-4).compose(GaussianDpEvent(single)).get_epsilon(1e-5)
    )
    true = gaussian_epsilon(single, 1e-5)
    assert true <= epsilon(spent, 1e-5) <= true * 1.002
    assert epsilon(spent, 1e-5) == pytest.approx(other, rel=2e-3)
    assert true <= epsilon_rdp(spent, 1e-5) <= 1.3 * true


def test_a_target_is_calibrated_to_the_rounds_planned() -> None:
    privacy = {key: value for key, value in BANDED.items() if key != "noise_multiplier"} | {"epsilon": 3.0}
    dp_plan = dp_plan_of(job(privacy), "client")
    assert dp_plan is not None and dp_plan.bands == 3
    assert gaussian_epsilon(dp_plan.noise_multiplier / planned_sensitivity(7, 3), 1e-3) == pytest.approx(
        3.0, rel=2e-3
    )
    charged: dict[int, int] = {}
    spent: Counter[Release] = Counter()
    for round in range(1, 8):
        cost = dp_plan.cost_of_round(charged, round)
        assert dp_plan.within_budget(spent, 1, cost)
        spent[cost] += 1
        charged[round] = 1
    assert epsilon(spent, 1e-3) <= 3.0 and epsilon(dp_plan.planned, 1e-3) <= 3.0
    assert not dp_plan.within_budget(spent, 1, dp_plan.cost_of_round(charged, 7))


def test_the_noise_over_rounds_has_the_covariance_of_the_matrix_mechanism() -> None:
    numbers, rounds, bands, deviation = 100_000, 6, 3, 1.7
    noise = CorrelatedNoise(bands)
    words = seeded(4)
    rows = [noise.release(np.zeros(numbers), Lattice(deviation, words)) for _ in range(rounds)]
    found = np.cov(np.stack(rows))
    inverse = np.linalg.inv(strategy_matrix(rounds, bands))
    true = deviation**2 * inverse @ inverse.T
    # The variance of an estimated covariance: (s_ii s_jj + s_ij^2) / n.
    error = np.sqrt((np.outer(np.diag(true), np.diag(true)) + true**2) / numbers)
    assert float((np.abs(found - true) / error).max()) < 6


def test_what_is_released_is_computed_from_noisy_sums_on_the_grid() -> None:
    """Released rows put through C give whole grid steps, and without noise the sums themselves."""
    lattice, draw = Lattice(1.3, seeded(5)), np.random.default_rng(1)
    sums = [draw.normal(size=50) for _ in range(6)]
    noise = CorrelatedNoise(3)
    released = np.stack([noise.release(total, lattice) for total in sums])
    steps = strategy_matrix(6, 3) @ released / lattice.granularity
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    quiet = CorrelatedNoise(3)
    silent = Lattice(1e-9, seeded(5))
    for total in sums:
        np.testing.assert_allclose(quiet.release(total, silent), total, atol=1e-7)
    assert len(noise.sums) == len(noise.released) == 2 and noise.sums[0] is sums[-1]


def test_what_is_done_with_a_release_does_not_change_the_noise_to_come() -> None:
    sums = np.random.default_rng(1).normal(size=(4, 50))
    kept, changed = CorrelatedNoise(3), CorrelatedNoise(3)
    ours, theirs = Lattice(1.3, seeded(5)), Lattice(1.3, seeded(5))
    for total in sums:
        expected, released = kept.release(total.copy(), ours), changed.release(total.copy(), theirs)
        assert np.array_equal(released, expected)
        released /= 7.0


def test_one_band_has_the_bits_of_the_independent_mechanism(tmp_path: Path) -> None:
    update = [Update("x", 1, {"w": torch.arange(40.0)}, 1)]
    mechanism = CentralGaussian(0.5, 1.1, 2.0, 1.0, seeded(3), correlation=CorrelatedNoise(1))
    assert CentralGaussian(0.5, 1.1, 2.0, 1.0, seeded(3)).correlation == CorrelatedNoise(1)
    lattice, total = lattice_for(1.1, 0.5, 40, seeded(3)), clipped_sum(update, clipping_norm=0.5)[0]
    for _ in range(3):
        mean = mechanism.release(update, {"w": torch.zeros(40)})[0]["w"]
        assert np.array_equal(mean.numpy(), lattice.added(total.numpy()) / 2.0)
    plain = {k: v for k, v in BANDED.items() if k not in ("mechanism", "bands")} | {"seeded_noise": True}
    results = [
        run(job(privacy, rounds=3), tmp_path / str(place))
        for place, privacy in enumerate((plain, plain | {"mechanism": "banded", "bands": 1}))
    ]
    assert results[0].model_sha256 == results[1].model_sha256
    assert results[0].privacy == results[1].privacy


@pytest.mark.parametrize(("rounds", "bands"), [(20, 2), (50, 5), (100, 20)])
def test_the_sums_of_rounds_have_less_error_for_the_same_epsilon(rounds: int, bands: int) -> None:
    """Against independent noise that is charged for every round, and for the same participations."""
    inverse = np.linalg.inv(strategy_matrix(rounds, bands))
    sums = np.tril(np.ones((rounds, rounds))) @ inverse
    assert prefix_error(rounds, coefficients(bands)) == pytest.approx(
        math.sqrt(float(np.square(sums).sum()) / rounds)
    )
    every, apart, banded = errors(rounds, bands)
    assert banded < 0.8 * apart < 0.8 * every


@pytest.mark.parametrize("over_sampling", [1.0, 1.3])
def test_a_clients_rounds_lie_apart(over_sampling: float) -> None:
    devices: dict[str, Any] = (
        {"devices": "phones", "over_sampling": over_sampling} if over_sampling > 1 else {}
    )
    setting = job(BANDED | {"bands": 4}, clients=29, cohort=5, rounds=60, **devices)
    names = [f"c{i:02d}" for i in range(29)]
    last: dict[str, int] = {}
    took_part: Counter[str] = Counter()
    for round in range(1, 61):
        cohort = sample(names, setting, round)
        assert cohort == sample(names, setting, round) == sorted(cohort)
        assert len(set(cohort)) == len(cohort) == math.ceil(5 * over_sampling - 1e-9)
        assert all(round - last.get(name, -4) >= 4 for name in cohort)
        last |= dict.fromkeys(cohort, round)
        took_part.update(cohort)
    assert set(took_part) == set(names)


INSTEAD = r"privacy\.mechanism: expected 'independent' "
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"bands": None}, {}, r"privacy\.bands: missing, expected in how many rounds in a row"),
    ({"bands": 8}, {}, r"privacy\.bands: found 8, .* up to federation\.rounds = 7"),
    ({"bands": 4}, {}, r"privacy\.bands: 4 rounds in a row need 8 different clients, 2 each; expected bands"
     r" up to 3 with federation\.clients = 6, or a smaller federation\.cohort"),
    ({}, {"cohort": None}, r"3 rounds in a row need 18 different clients, 6 each; expected bands up to 1"),
    ({}, {"cohort": None, "cohort_rate": 0.3}, INSTEAD + r"with federation\.cohort_rate, whose coins"),
    ({"clipping": "adaptive"}, {}, INSTEAD + r"with clipping = 'adaptive', found 'banded'"),
    ({"where": "distributed"}, {"cohort": 3, "clients": 9}, INSTEAD + r"with where = 'distributed'"),
    ({"audit": True}, {}, INSTEAD + r"with privacy\.audit"),
    ({"mechanism": "independent"}, {}, r"privacy\.bands has no meaning with mechanism = 'independent'"),
    ({"mechanism": "matrix"}, {}, r"privacy\.mechanism: expected 'independent' or 'banded', found 'matrix'"),
    ({"unit": "example", "sampling_rate": 0.1}, {}, INSTEAD + r"for the unit 'example'"),
    ({"unit": "none"}, {}, r"has no meaning with unit = 'none'"),
]  # fmt: skip


@pytest.mark.parametrize(("privacy", "federation", "pattern"), REFUSED)
def test_what_it_cannot_be_composed_with_is_refused_by_key(
    privacy: dict[str, Any], federation: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern) as refused:
        job(BANDED | privacy, **federation)
    assert len(str(refused.value).splitlines()) == 1


def test_two_promises_take_independent_noise() -> None:
    table = {k: v for k, v in BANDED.items() if k != "unit"}
    example = {"noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.1}
    with pytest.raises(
        ConfigError, match=r"privacy\.client\.mechanism: expected 'independent' with unit = 'both'"
    ):
        job({"unit": "both", "client": table, "example": example})


def run(setting: Job, out: Path, **options: Any) -> RunResult:
    return simulate(setting, out, on_event=ignore_events, **{"report": False, **options})


class Cut(Exception):
    """A run's end in the middle."""


def cut_after(last: int) -> Any:
    def on_event(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] == last:
            raise Cut

    return on_event


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    setting = job(BANDED | {"seeded_noise": True})
    whole = run(setting, tmp_path / "whole")
    assert whole.privacy["sensitivity"] ** 2 == pytest.approx(slowly(dict.fromkeys(range(1, 8), 1), 3))
    assert whole.privacy["epsilon"] == pytest.approx(
        epsilon({Release(0.7 / planned_sensitivity(7, 3), 1.0): 1}, 1e-3), rel=1e-6
    )
    assert "one of any 3 rounds in a row" in whole.privacy["sampler"]
    out = tmp_path / "cut"
    with pytest.raises(Cut):
        simulate(setting, out, on_event=cut_after(5), report=False)
    checkpoints = sorted((out / "checkpoints").glob("round-*"))
    for checkpoint in checkpoints[1:]:
        checkpoint.unlink()
    result = run(setting, out, resume=True)
    assert result.model_sha256 == whole.model_sha256
    assert result.privacy == whole.privacy
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole.model_sha256


@pytest.mark.slow
def test_a_run_that_is_stopped_claims_the_rounds_it_made_and_a_lost_round_twice(tmp_path: Path) -> None:
    setting, out = job(BANDED), tmp_path / "run"
    with pytest.raises(Cut):
        simulate(setting, out, on_event=cut_after(5), report=False)
    sorted((out / "checkpoints").glob("round-*"))[-1].unlink()  # round 5 is lost, and made again
    result = run(setting, out, resume=True)
    releases = dict.fromkeys(range(1, 8), 1) | {5: 2}
    assert result.privacy["releases"] == 8
    assert result.privacy["sensitivity"] ** 2 == pytest.approx(slowly(releases, 3))
    true = gaussian_epsilon(0.7 / math.sqrt(slowly(releases, 3)), 1e-3)
    assert true * (1 - 1e-9) <= result.privacy["epsilon"] <= true * 1.002
    target = {k: v for k, v in BANDED.items() if k != "noise_multiplier"} | {"epsilon": 6.0}
    setting, out = job(target), tmp_path / "target"
    with pytest.raises(Cut):
        simulate(setting, out, on_event=cut_after(2), report=False)
    for checkpoint in (out / "checkpoints").glob("round-*"):
        checkpoint.unlink()  # both rounds are
    result = run(setting, out, resume=True)
    assert "above the target 6.0" in result.privacy["ended_early"]
    assert 0 < len(result.rounds) < 7 and result.privacy["epsilon"] <= 6.0


@pytest.mark.slow
def test_what_the_noise_is_known_by_is_in_checkpoints_alone_for_their_owner(tmp_path: Path) -> None:
    from atoll.server.run.checkpoint import latest

    setting, out = job(BANDED), tmp_path / "run"
    run(setting, out, report=True)
    found = latest(out / "checkpoints", setting.hash)
    assert found is not None
    secret = {name: value for name, value in found.state.items() if name.startswith("secret.")}
    assert sorted(secret) == ["secret.banded.released", "secret.banded.sums"]
    assert all((path.stat().st_mode & 0o777) == 0o600 for path in (out / "checkpoints").glob("*.safetensors"))
    rows = [row.numpy().tobytes()[:64] for value in secret.values() for row in cast(torch.Tensor, value)]
    assert len(rows) == 4
    for path in out.rglob("*"):
        if path.is_file() and path.parent.name != "checkpoints":
            content = path.read_bytes()
            assert b"secret." not in content and not any(row in content for row in rows)


def test_a_run_is_not_resumed_with_other_clients_nor_begun_with_too_few(tmp_path: Path) -> None:
    from atoll.server.rounds.central_dp import CentralDp, LedgerLocation

    setting = job(BANDED)
    dp_plan = dp_plan_of(setting, "client")
    assert dp_plan is not None

    def protection() -> CentralDp:
        return CentralDp(setting, dp_plan, LedgerLocation(tmp_path / "ledger.jsonl", "test"), "run")

    first = protection()
    first.check_clients(list("abcdef"))
    first.privatize(1, [], {"w": torch.zeros(3)}, {})
    protection().check_clients(list("abcdef"))
    with pytest.raises(ConfigError, match="cannot resume: clients have joined or left"):
        protection().check_clients(list("abcdeg"))
    with pytest.raises(ConfigError, match="3 rounds in a row need 6 different clients, 5 take part"):
        protection().check_clients(list("abcde"))


def test_a_run_beyond_its_target_is_refused_before_the_release(tmp_path: Path) -> None:
    from atoll.server.rounds.central_dp import CentralDp, LedgerLocation

    privacy = {k: v for k, v in BANDED.items() if k != "noise_multiplier"} | {"epsilon": 6.0}
    setting = job(privacy)
    dp_plan = dp_plan_of(setting, "client")
    assert dp_plan is not None
    guard = CentralDp(setting, dp_plan, LedgerLocation(tmp_path / "ledger.jsonl", "test"), "run")
    for round in range(1, 8):
        guard.privatize(round, [], {"w": torch.zeros(3)}, {})
    with pytest.raises(BudgetExhausted, match=r"above the target 6\.0"):
        guard.privatize(7, [], {"w": torch.zeros(3)}, {})
    assert sum(guard.spent.values()) == 7


def test_canaries_that_are_in_every_round_attack_no_such_run() -> None:
    from atoll.sim.audit.replay import job_to_replay

    with pytest.raises(ConfigError, match=r"privacy\.mechanism: a run with 'banded' can't be attacked"):
        job_to_replay(job(BANDED))
