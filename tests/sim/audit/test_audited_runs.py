"""Whole runs under attack: real noise stays below its claim, a quarter of it does not."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.cli.main import run as command_line
from atoll.client.dp.dp_sgd import DpSgd, clip_factors
from atoll.client.heads.feature_table import ClientRows
from atoll.client.heads.layers import LOSSES
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.privacy.accounting import epsilon
from atoll.privacy.auditing.membership import area
from atoll.privacy.clipping import clipped_sum
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.noise import Lattice
from atoll.protocol.messages import Update
from atoll.protocol.tensors import tensors_sha256
from atoll.report.audit import what_the_audit_found
from atoll.server.job_checks import validate_for_deployment
from atoll.server.rounds.cohort import sample
from atoll.server.run.directory import job_toml
from atoll.sim.audit.audit import MIN_CANARIES, Audit, audited, canaries_for
from atoll.sim.audit.client_canaries import CanaryClients
from atoll.sim.audit.example_canaries import CanaryFeatures, carrier_with, owners
from atoll.sim.audit.mislabelled_canaries import Mislabelled, MislabelledIndex
from atoll.sim.audit.replay import Canaries, RoundTranscript, job_to_replay, replayed
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.population import Population, client_names
from tests.privacy.runs.test_private_runs import job, run

pytestmark = pytest.mark.slow

CLIENT = {"unit": "client", "noise_multiplier": 2.0, "delta": 1e-6, "clipping_norm": 0.5}
EXAMPLE = CLIENT | {"unit": "example", "sampling_rate": 1.0}
ONCE = {"cohort": None, "rounds": 1}
SETTINGS = {
    "clients, at the server": CLIENT,
    "clients, distributed": CLIENT | {"where": "distributed"},
    "examples, at the client": EXAMPLE,
    "examples, distributed": EXAMPLE | {"where": "distributed"},
}
EVERYBODY = {"partition": {"kind": "iid"}}


def quiet(done: int, total: int) -> None: ...


def claim_of(setting: Job) -> dict[str, Any]:
    """What a complete run of one promise would claim."""
    [unit] = setting.privacy.units
    dp_plan = dp_plan_of(setting, unit)
    assert dp_plan is not None
    spent = {"epsilon": epsilon(dp_plan.planned, dp_plan.delta), "releases": dp_plan.releases}
    return {"units": {unit: spent}}


def attacked(setting: Job, how: Audit, claim: dict[str, Any] | None = None) -> dict[str, Any]:
    found = audited(
        setting, claim_of(setting) if claim is None else claim, how,
        population=Population.of(setting), watch=quiet,
    )  # fmt: skip
    [unit] = found["units"].values()
    assert unit["contradicted"] == found["contradicted"]
    return dict(unit)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_real_noise_stays_below_its_claim_and_a_quarter_of_it_does_not(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = job(SETTINGS[name], federation=ONCE, data=EVERYBODY)
    honest = attacked(setting, Audit(canaries=2000))
    assert honest["claimed_epsilon"] == pytest.approx(2.24, abs=0.05)
    assert 0.1 < honest["one_run"]["epsilon"] < honest["f_dp"]["epsilon"] < honest["claimed_epsilon"]
    assert 0 < honest["gaussian_sums"]["epsilon"] < honest["claimed_epsilon"]
    assert not honest["contradicted"]
    whole = Lattice.whole_noise
    monkeypatch.setattr(Lattice, "whole_noise", lambda lattice, count: whole(lattice, count) // 4)
    broken = attacked(setting, Audit(canaries=2000))
    assert broken["claimed_epsilon"] == honest["claimed_epsilon"]
    assert broken["one_run"]["epsilon"] > broken["claimed_epsilon"]
    assert broken["f_dp"]["epsilon"] > broken["claimed_epsilon"]
    assert broken["gaussian_sums"]["epsilon"] > 2 * broken["claimed_epsilon"]
    assert broken["contradicted"]


def unclipped_sum(updates: Sequence[Update], *, clipping_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    return clipped_sum(updates, clipping_norm=1e9)


def unclipped_factors(
    values: Any, each: Any, share: torch.Tensor, private: DpSgd, scales: Any = None
) -> torch.Tensor:
    return clip_factors(values, each, share, replace(private, clipping_norm=1e9))


@pytest.mark.parametrize("name", SETTINGS)
def test_an_audit_notices_that_nobody_clips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.privacy.central.clipped_sum", unclipped_sum)
    for room in ("atoll.sim.audit.client_canaries", "atoll.client.dp.secure_aggregation"):
        monkeypatch.setattr(f"{room}.clipped", lambda numbers, clipping_norm: numbers)
    monkeypatch.setattr("atoll.client.heads.train.clip_factors", unclipped_factors)
    monkeypatch.setattr("atoll.client.dp.gradient_sums.clip_factors", unclipped_factors)
    setting = job(SETTINGS[name], federation=ONCE, data=EVERYBODY)
    found = attacked(setting, Audit(canaries=2000))
    assert found["contradicted"]
    assert found["gaussian_sums"]["epsilon"] > found["claimed_epsilon"]


EPSILON_8: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, "clipping_norm": 0.5}
STRONG: dict[str, dict[str, Any]] = {
    "clients, at the server": {"unit": "client"},
    "examples, at the client": {"unit": "example", "sampling_rate": 0.5, "steps": 1},
    "examples, distributed": {"unit": "example", "sampling_rate": 1.0, "steps": 1, "where": "distributed"},
}


@pytest.mark.parametrize("name", STRONG)
def test_most_of_a_claim_of_epsilon_8_is_proven_and_never_more_than_it(name: str) -> None:
    setting = job(
        EPSILON_8 | STRONG[name],
        federation=ONCE | {"rounds": 3, "secure_threshold": 1.0}, data=EVERYBODY, train={"lr": 0.02},
    )  # fmt: skip
    found = attacked(setting, Audit(usual=10_000))
    assert found["claimed_epsilon"] == pytest.approx(8.0, abs=0.05)
    assert found["gaussian_sums"]["confidence"] == pytest.approx(1 - 1e-6)
    assert 0.6 * found["claimed_epsilon"] < found["gaussian_sums"]["epsilon"] < found["claimed_epsilon"]


def test_a_server_that_adapts_its_steps_and_its_clipping_norm_hides_nothing() -> None:
    """Scores are of the noised mean, in clipping norms: neither has an effect on how far they lie apart."""
    setting = job(
        {"unit": "client", "clipping": "adaptive", **EPSILON_8}, strategy={"name": "fedadam"},
        federation=ONCE | {"rounds": 6}, data=EVERYBODY,
    )  # fmt: skip
    found = attacked(setting, Audit(usual=4000))
    assert 0.6 * found["claimed_epsilon"] < found["gaussian_sums"]["epsilon"] < found["claimed_epsilon"]


def test_the_attack_on_a_gaussian_release_is_as_strong_as_it_can_be() -> None:
    """Scores of canaries that are in and out lie mu = sqrt(releases) / noise multiplier deviations apart."""
    for privacy, mu in (
        (CLIENT, 2**0.5 / 2),
        (EXAMPLE, 2**0.5 / 2),
        (SETTINGS["clients, distributed"], 0.645),
    ):
        # Of six clients five are enough for all of the noise: with six it is sqrt(6 / 5) as much. The
        # clients' classes are skewed, so that biases move far: that must not drown the canaries.
        setting = job_to_replay(job(privacy, federation=ONCE | {"rounds": 2}))
        population = Population.of(setting)
        canaries = canaries_for(setting, population, setting.privacy.units[0], Audit(canaries=2000))
        inside = np.arange(2000) % 2 == 0
        # Of 8000 scores it is known to a deviation of 0.022: the tolerance is five of them or more.
        found = []
        for _ in range(4):
            scores = replayed(setting, population, canaries, inside, lambda: None)
            found.append((scores[inside].mean() - scores[~inside].mean()) / scores[~inside].std())
        apart = np.mean(found)
        assert apart == pytest.approx(mu, rel=0.2)


def test_sampled_clients_are_attacked_with_the_coins_of_the_run() -> None:
    setting = job(
        CLIENT | {"noise_multiplier": 1.0}, federation={"cohort": None, "cohort_rate": 0.5, "rounds": 1}
    )
    population = Population.of(setting)
    canaries = canaries_for(setting, population, "client", Audit(canaries=400))
    drawn: list[int] = []

    class Counted:
        count, what = canaries.count, canaries.what
        names, carrier, scores = canaries.names, canaries.carrier, canaries.scores
        scores_are_sums = canaries.scores_are_sums

        def joined(self, run: Any, updates: Any, present: Any) -> Any:
            drawn.append(len(present))
            return canaries.joined(run, updates, present)

    replayed(setting, population, Counted(), np.ones(400, dtype=bool), lambda: None)
    # 400 coins of one half: within five deviations of 10.
    assert 150 <= drawn[0] <= 250
    found = attacked(setting, Audit(canaries=400))
    assert found["f_dp"]["epsilon"] < found["claimed_epsilon"]


class Recorded:
    """Nobody's canaries: keeps the last model that was seen."""

    def __init__(self, canaries: Canaries) -> None:
        self.inner, self.count, self.what = canaries, canaries.count, canaries.what
        self.names, self.carrier, self.joined = canaries.names, canaries.carrier, canaries.joined
        self.scores_are_sums = canaries.scores_are_sums

    def scores(self, seen: RoundTranscript, inside: Any) -> Any:
        self.last = seen.after
        return self.inner.scores(seen, inside)


@pytest.mark.parametrize(
    "tables", [{}, {"train": {"augment": ["flip"], "cached_views": 2}}], ids=["plain", "views"]
)
def test_a_replay_without_canaries_is_the_run_bit_for_bit(tmp_path: Path, tables: dict[str, Any]) -> None:
    setting = job({"unit": "none"}, **tables)
    result = run(setting, tmp_path / "run")
    population = Population.of(setting)
    recorded = Recorded(canaries_for(setting, population, "example", Audit(canaries=50)))
    replayed(setting, population, recorded, np.zeros(50, dtype=bool), lambda: None)
    assert tensors_sha256(recorded.last) == result.model_sha256
    replayed(setting, population, recorded, np.ones(50, dtype=bool), lambda: None)
    assert tensors_sha256(recorded.last) != result.model_sha256


def test_a_run_without_a_promise_leaks_nearly_every_canary() -> None:
    found = attacked(
        job({"unit": "none"}, federation=ONCE | {"rounds": 2}), Audit(canaries=400, shadows=3), {}
    )
    assert found["claimed_epsilon"] is None and not found["contradicted"]
    # 400 of 400 would prove log(400 / 3) = 4.9 without the price of choosing.
    assert found["one_run"]["epsilon"] > 3.0
    assert found["membership"]["auc"] > 0.99
    assert found["membership"]["tpr_at_fpr_0.01"] > 0.9
    told = what_the_audit_found({"units": {"example": found}, "contradicted": False, "confidence": 0.95})
    assert found["gaussian_sums"] is None
    assert "Nothing finite was claimed" in told and "Gaussian" not in told


def test_canary_clients_have_directions_of_their_own() -> None:
    setting = job(CLIENT)
    population = Population.of(setting)
    canaries = canaries_for(setting, population, "client", Audit(canaries=300))
    assert isinstance(canaries, CanaryClients)
    rows = np.concatenate(list(canaries._directions(range(300))))
    np.testing.assert_allclose(rows @ rows.T, np.eye(300), atol=1e-10)
    model = canaries.model
    released = Update("the cohort", 1, {n: t[0] for n, t in canaries._deltas([7], 0.5).items()}, 1)
    seen = RoundTranscript(model, model, [], [released], clipping_norm=0.25)
    # 0.5 is twice the clipping norm.
    scores = canaries.scores(seen, np.zeros(300, dtype=bool))
    np.testing.assert_allclose(scores, 2.0 * (np.arange(300) == 7), atol=1e-5)


def test_canary_examples_are_clipped_and_hardly_touch_what_the_data_does() -> None:
    setting = job(EXAMPLE, data=EVERYBODY)
    population = Population.of(setting)
    canaries = canaries_for(setting, population, "example", Audit(canaries=600))
    assert isinstance(canaries, CanaryFeatures)
    data = canaries.learner.features.for_training(population.whole(canaries.learner))[0]
    along = (data @ canaries.features.T) / canaries.features.norm(dim=1)
    assert float(along.square().mean().sqrt()) < 0.02 * float(data.norm(dim=1).median())
    pairs = {
        (f.tobytes(), int(t), o)
        for f, t, o in zip(canaries.features.numpy(), canaries.targets, canaries.owner, strict=True)
    }
    assert len(pairs) == 600
    assert set(canaries.owner) == set(owners(setting))
    # One step of one client with one canary: the update is as long as the clipped gradient, times lr.
    local = HeadTrainingConfig(
        setting.model_copy(update={"privacy": job({"unit": "none"}).privacy}), LOSSES["softmax"], 1
    )
    head = canaries.learner.initial()
    [update] = train_heads(head, canaries._examples, [ClientRows("c", np.array([3]))], local)
    norm = torch.cat([t.reshape(-1) for t in update.delta.values()]).norm() / setting.train.lr
    assert float(norm) > 2 * 0.5


def test_the_busiest_clients_take_the_canaries() -> None:
    setting = job({"unit": "none"}, federation={"clients": 40, "cohort": 4, "rounds": 6})
    times = Counter(n for r in range(1, 7) for n in sample(client_names(40), setting, r))
    most = max(times.values())
    assert owners(setting) == sorted(n for n, count in times.items() if count >= 0.8 * most)


def last_k(privacy: dict[str, Any], **tables: Any) -> Job:
    """A model whose gradients have no closed form, on a few images."""
    small = {"data": EVERYBODY | {"test_fraction": 0.9}, "tune": {"method": "last-k", "layers": 1}}
    return job(privacy, **(small | {"federation": {"clients": 3, "cohort": None, "rounds": 2}} | tables))


def test_mislabelled_examples_are_there_or_not_at_one_client() -> None:
    setting = last_k({"unit": "none"})
    population = Population.of(setting)
    canaries = canaries_for(setting, population, "example", Audit(canaries=20))
    assert isinstance(canaries, Mislabelled)
    inside = np.arange(20) < 12
    index = MislabelledIndex(population, canaries.learner, canaries=canaries, inside=inside)
    plain = PopulationIndex(population, canaries.learner)
    held = np.concatenate([train for train, _ in index.splits(range(3))])
    assert set(canaries.rows[inside]) <= set(held) and not set(canaries.rows[~inside]) & set(held)
    everything = np.concatenate([train for train, _ in plain.splits(range(3))])
    assert len(held) == len(everything) - 8
    changed = (index.full_population.targets != plain.full_population.targets).nonzero().flatten().numpy()
    assert sorted(changed) == sorted(canaries.rows)
    assert carrier_with(population, lambda learner: index).engine == "inline"


@pytest.mark.slow
def test_a_model_that_learns_by_heart_gives_its_mislabelled_examples_away() -> None:
    """Inputs that vary keep features out of the cache, so that a head counts as any other model."""
    setting = last_k(
        {"unit": "none"},
        tune={"method": "head"},
        backbone={"name": "raw:pixels", "image_size": 16},
        train={"lr": 0.1, "epochs": 15, "batch_size": 8, "optimizer": "adam", "augment": ["flip"]},
        federation={"clients": 2, "cohort": None, "rounds": 2},
    )
    population = Population.of(setting)
    canaries = canaries_for(setting, population, "example", Audit(canaries=60))
    assert isinstance(canaries, Mislabelled)
    inside = np.arange(60) % 2 == 0
    scores = replayed(setting, population, canaries, inside, lambda: None)
    assert area(scores, inside) > 0.7


@pytest.mark.parametrize("unit", ["client", "example"])
def test_models_without_a_closed_form_are_audited_too(unit: str) -> None:
    privacy = CLIENT if unit == "client" else EXAMPLE | {"sampling_rate": 0.5}
    found = attacked(
        last_k(privacy, federation={"clients": 3, "cohort": None, "rounds": 1}), Audit(canaries=40)
    )
    assert found["canaries"] == 40 and not found["contradicted"]
    assert (found["gaussian_sums"] is None) == (unit == "example")  # a loss is no sum of releases
    assert 0 <= found["one_run"]["epsilon"] <= found["claimed_epsilon"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"canaries": MIN_CANARIES - 1}, "--canaries: expected 16 or more, found 15"),
        ({"confidence": 1.0}, "--confidence: expected a number from 0.5 to below 1, found 1.0"),
        ({"shadows": 1}, "--shadows: expected none, or 2 or more, found 1"),
    ],
)
def test_an_audit_that_cannot_be_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Audit(**how)


def test_more_canaries_than_there_can_be_are_refused() -> None:
    setting = job(CLIENT)
    with pytest.raises(ConfigError, match=r"canaries: expected 5130 at most, .* found 6000"):
        canaries_for(setting, Population.of(setting), "client", Audit(canaries=6000))


def test_a_job_can_ask_for_its_audit(tmp_path: Path) -> None:
    setting = job(EXAMPLE | {"audit": True}, federation=ONCE)
    result = run(setting, tmp_path / "run")
    told = result.privacy["audit"]
    assert told["units"]["example"]["canaries"] == 256
    assert told["units"]["example"]["claimed_epsilon"] == result.privacy["epsilon"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["privacy"]["audit"] == told
    assert "found no contradiction" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"privacy\.audit: .* only a simulation can be attacked"):
        validate_for_deployment(setting)
    with pytest.raises(ConfigError, match=r"audit has no meaning with unit = 'none'"):
        job({"unit": "none", "audit": True})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited") / "run"
    run(job(EXAMPLE, federation=ONCE), folder)
    return folder


def test_the_verb_prints_the_bounds_and_writes_them_down(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command_line(
        ["audit", str(finished), "--canaries", "200", "--shadows", "2", "--out", str(tmp_path / "copy.json")]
    )
    printed = capsys.readouterr().out
    assert code == 0
    for part in (
        "claimed (PLD)", "one-run audit by f-DP", "proven of Gaussian noise, by sums", "99.9999%",
        "found at .1 % false alarms", "AUC", "canaries", "200", "95 % confidence", "if its noise is Gaussian",
        "what one update of the head gives away", "never that it is true",
    ):  # fmt: skip
        assert part in printed
    found = json.loads((finished / "audit.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == found
    assert found["units"]["example"]["membership"]["shadows"] == 2
    assert found["inversion"]["unprotected"]["one"]["label"] == 1.0


def test_a_claim_that_the_attack_refutes_is_an_alarm(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("job.toml", "result.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    result = json.loads((tmp_path / "result.json").read_text())
    result["privacy"]["units"]["example"]["epsilon"] = 0.01
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert command_line(["audit", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "ALARM: the attack contradicts the claim" in printed and "and 0.01 was claimed" in printed
    assert json.loads((tmp_path / "audit.json").read_text())["contradicted"]


def test_what_cannot_be_replayed_is_refused_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.toml").write_text(job_toml(job(EXAMPLE, federation=ONCE)))
    result = json.loads((finished / "result.json").read_text())

    def refused(*arguments: str) -> str:
        assert command_line(["audit", *arguments]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1
        return line

    assert "not finished" in refused(str(tmp_path))
    (tmp_path / "result.json").write_text(json.dumps(result | {"engine": "flower"}))
    assert "a run of real sites, whose data is not here" in refused(str(tmp_path))
    (tmp_path / "result.json").write_text(json.dumps(result | {"privacy": None}))
    assert "result.json: privacy: " in refused(str(tmp_path))
    assert "no such run directory" in refused(str(tmp_path / "nowhere"))
    assert "--out: expected a file" in refused(str(finished), "--out", str(tmp_path / "no" / "file"))
    assert "--canaries" in refused(str(finished), "--canaries", "3")
