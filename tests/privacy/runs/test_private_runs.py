"""Whole runs under a promise: what is spent, what is written down, what is kept silent."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.site import Site
from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import Job
from atoll.kit.kit import Budget
from atoll.privacy.accounting import Release, epsilon
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.ledger import Entry, Ledger
from atoll.protocol.messages import CHARGED_ROUNDS, Failure, Reply, SecureMessage, Update
from atoll.protocol.requests import (
    EvaluateRequest,
    ModelRequest,
    Request,
    TrainRequest,
    UnmaskedSumRequest,
    origin_of,
)
from atoll.report.run_result import RunResult
from atoll.server.events import Event, RoundEnded, ignore_events
from atoll.server.job_checks import validate_for_deployment
from atoll.server.rounds.central_dp import run_key
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population
from tests.sim.test_simulation import DIGITS, Hostile

pytestmark = pytest.mark.slow

CLIENT = {"unit": "client", "noise_multiplier": 0.7, "delta": 1e-3, "clipping_norm": 0.5}
EXAMPLE = {
    "unit": "example", "noise_multiplier": 0.8, "delta": 1e-4, "sampling_rate": 0.25, "clipping_norm": 0.5,
}  # fmt: skip
SEEDED = {"seeded_noise": True}
POISSON = {"cohort": None, "cohort_rate": 0.6}
CLASSES = {"classes": [str(digit) for digit in range(10)]}
"""What a real site doesn't tell of its data."""


def job(privacy: dict[str, Any], **tables: Any) -> Job:
    wanted = DIGITS | {k: DIGITS.get(k, {}) | v for k, v in tables.items()} | {"privacy": privacy}
    return Job.parse(wanted, origin="test")


def run(job: Job, out: Path, **options: Any) -> RunResult:
    return simulate(job, out, on_event=ignore_events, **{"report": False, **options})


def cut_and_resumed(setting: Job, out: Path) -> RunResult:
    """The result of a run that ends in its third round, without its latest checkpoints, and goes on."""

    class Cut(Exception): ...

    def cut_after_three(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] == 3:
            raise Cut

    with pytest.raises(Cut):
        simulate(setting, out, on_event=cut_after_three, report=False)
    for checkpoint in sorted((out / "checkpoints").glob("round-*"))[1:]:
        checkpoint.unlink()  # as after a kill: what came later was not on the disk yet
    return run(setting, out, resume=True)


def test_a_client_level_run_says_what_it_spent_and_nothing_of_its_clients(tmp_path: Path) -> None:
    setting = job(CLIENT, federation=POISSON)
    result = run(setting, tmp_path / "run", report=True)
    privacy = result.privacy
    spent = {Release(0.7, 0.6): 4}
    assert privacy["epsilon"] == epsilon(spent, 1e-3)
    assert privacy["epsilon"] < privacy["epsilon_rdp"]
    assert (privacy["unit"], privacy["where"], privacy["releases"]) == ("client", "server", 4)
    assert privacy["sampler"] == "Poisson, each of the clients with probability 0.6"
    assert "PLD" in privacy["accountant"] and privacy["relation"] == "add-or-remove-one"
    ledger = Ledger.open(tmp_path / "run" / "ledger.jsonl", setting.hash)
    assert dict(ledger.spent) == spent and [e.round for e in ledger.entries] == [1, 2, 3, 4]
    assert result.final["clients"] == {} and "accuracy" in result.final["server"]
    for line in result.rounds:
        assert (line["cohort"], line["loss"], line["set_aside"], line["trained"]) == ([], None, {}, 4)
    assert "client-000" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "epsilon" in (tmp_path / "run" / "report.html").read_text()


def test_a_fixed_cohort_is_charged_without_amplification(tmp_path: Path) -> None:
    privacy = run(job(CLIENT), tmp_path / "run").privacy
    assert privacy["epsilon"] == epsilon({Release(0.7, 1.0): 4}, 1e-3)
    assert privacy["sampler"] == "none that counts: all clients are charged for every release"


def test_real_noise_never_repeats_and_seeded_noise_does_on_every_path(tmp_path: Path) -> None:
    for privacy in (CLIENT, EXAMPLE):
        real = [run(job(privacy), tmp_path / f"{privacy['unit']}-{i}").model_sha256 for i in range(2)]
        assert real[0] != real[1]
        seeded = [
            run(job(privacy | SEEDED), tmp_path / f"{privacy['unit']}-{engine}", engine=engine)
            for engine in ("inline", "loop")
        ]
        assert seeded[0].model_sha256 == seeded[1].model_sha256
        assert seeded[0].privacy["epsilon"] == seeded[1].privacy["epsilon"]


@pytest.mark.parametrize("privacy", [CLIENT, EXAMPLE], ids=["client", "example"])
def test_a_seeded_run_that_was_cut_off_ends_in_the_same_bits_and_the_same_epsilon(
    tmp_path: Path, privacy: dict[str, Any]
) -> None:
    setting = job(privacy | SEEDED)
    whole = run(setting, tmp_path / "whole")
    result = cut_and_resumed(setting, tmp_path / "cut")
    assert result.model_sha256 == whole.model_sha256
    assert result.privacy["epsilon"] == whole.privacy["epsilon"]


def test_a_real_round_that_was_lost_is_charged_again_and_the_gate_ends_the_run(tmp_path: Path) -> None:
    privacy = {"unit": "client", "epsilon": 6.0, "delta": 1e-3, "clipping_norm": 0.5}
    setting, out = job(privacy), tmp_path / "run"
    ledger = Ledger.open(out / "ledger.jsonl", setting.hash)
    dp_plan = dp_plan_of(setting, "client")
    assert dp_plan is not None
    for round in (1, 2):  # charged by a run that was killed before its first checkpoint
        ledger.charge(Entry(run_key(setting, out), round, "client", dp_plan.event))
    (out / "job.toml").write_text(_toml(setting))
    result = run(setting, out, resume=True)
    assert len(result.rounds) == 2
    assert result.privacy["releases"] == 4
    assert result.privacy["epsilon"] <= 6.0
    assert "above the target 6.0" in result.privacy["ended_early"]
    assert any("above the target" in note for note in result.notes)


def _toml(setting: Job) -> str:
    from atoll.server.run.directory import job_toml

    return job_toml(setting)


def test_a_round_below_its_quorum_releases_nothing_and_is_not_charged(tmp_path: Path) -> None:
    population = Population.of(job(CLIENT, federation={"cohort": 6, "quorum": 0.8}))
    carrier, out = Hostile.of(population), tmp_path / "run"
    with pytest.raises(InconsistentUpdates, match=r"round 1: 4 of 6 usable updates, needed 5"):
        run_job(population.job, carrier, out, cached_test_set(population, None), report=False)
    assert not Ledger.open(out / "ledger.jsonl", population.job.hash).entries
    assert not (out / "checkpoints").exists()


def test_an_example_level_run_charges_each_client_for_its_own_steps(tmp_path: Path) -> None:
    result = run(job(EXAMPLE), tmp_path / "run")
    took_part = Counter(name for line in result.rounds for name in line["cohort"])
    most = max(took_part.values())
    # A step takes a quarter of the examples, an epoch is four of them.
    assert result.privacy["releases"] == 4 * most
    assert result.privacy["epsilon"] == epsilon({Release(0.8, 0.25): 4 * most}, 1e-4)
    for name, times in took_part.items():
        ledger = Ledger.open(tmp_path / "run" / "ledgers" / f"{name}.jsonl", f"example of {name}")
        assert dict(ledger.spent) == {Release(0.8, 0.25): 4 * times}
    assert result.final["clients"] == {}
    assert all(line["loss"] is None for line in result.rounds)


@pytest.mark.parametrize("masks", [False, True])
def test_a_secure_sum_of_updates_with_their_own_noise_tells_what_they_cost(
    masks: bool, tmp_path: Path
) -> None:
    """Found by the rows of every pair of options: this was told as epsilon 0."""
    setting = job(EXAMPLE, federation={"secure_aggregation": True, "cohort": 6})
    population, out = Population.of(setting), tmp_path / "run"
    carrier = InlineTransport.of(population, ledgers=PrivacyLedgers(out / "ledgers"))
    carrier.uses_masking = masks
    result = run_job(setting, carrier, out, cached_test_set(population, None), report=False)
    assert result.privacy["releases"] == 4 * 4
    assert result.privacy["epsilon"] == epsilon({Release(0.8, 0.25): 16}, 1e-4)


class Twisted(InlineTransport):
    """One client tells no charge in its part of a secure sum, or none that is a number of rounds."""

    told: torch.Tensor | None = None

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply]:
        for reply in super().send_and_receive(request, names, timeout):
            if isinstance(reply, SecureMessage) and reply.client == "client-0000":
                content = {n: t for n, t in reply.content.items() if n != CHARGED_ROUNDS}
                other = {} if self.told is None else {CHARGED_ROUNDS: self.told}
                reply = SecureMessage(reply.client, reply.round, content | other)
            yield reply


@pytest.mark.parametrize(
    "told", [None, torch.tensor(0.0), torch.ones(2), torch.tensor(float("nan")), torch.tensor(2j)], ids=str
)
def test_a_part_of_a_secure_sum_that_tells_no_charge_is_left_out(
    told: torch.Tensor | None, tmp_path: Path
) -> None:
    setting = job(EXAMPLE, federation={"secure_aggregation": True, "cohort": 6, "rounds": 1})
    population, out = Population.of(setting), tmp_path / "run"
    carrier = Twisted.of(population, ledgers=PrivacyLedgers(out / "ledgers"))
    carrier.told = told
    result = run_job(setting, carrier, out, cached_test_set(population, None), report=False)
    why = "it does not tell how many rounds its ledger was charged"
    assert result.rounds[0]["set_aside"] == {"client-0000": why}
    assert result.rounds[0]["trained"] == 5 and result.privacy["releases"] == 4


class Unheard(InlineTransport):
    """Two clients' updates are lost on their way."""

    lost = ("client-0000", "client-0005")

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply]:
        for reply in super().send_and_receive(request, names, timeout):
            if reply.client not in self.lost:
                yield reply


def test_whoever_is_charged_and_not_heard_counts_in_the_claim(tmp_path: Path) -> None:
    """The clients that are asked most often tell nobody what they were charged."""
    setting = job(EXAMPLE, federation={"cohort": 3, "quorum": 0.1, "rounds": 5})
    population, out = Population.of(setting), tmp_path / "run"
    carrier = Unheard.of(population, ledgers=PrivacyLedgers(out / "ledgers"))
    result = run_job(setting, carrier, out, cached_test_set(population, None), report=False)
    asked = Counter(name for line in result.rounds for name in line["cohort"])
    times = max(asked.values())
    heard = max(count for name, count in asked.items() if name not in Unheard.lost)
    assert times > heard
    ledgers = [Ledger.open(out / "ledgers" / f"{n}.jsonl", f"example of {n}") for n in Unheard.lost]
    assert max(ledger.spent[Release(0.8, 0.25)] for ledger in ledgers) == 4 * times
    assert result.privacy["releases"] == 4 * times


def test_both_promises_are_kept_and_both_epsilons_told(tmp_path: Path) -> None:
    both = {"unit": "both", "client": dict(CLIENT), "example": dict(EXAMPLE)}
    for table in ("client", "example"):
        del both[table]["unit"]  # type: ignore[attr-defined]
    privacy = run(job(both), tmp_path / "run").privacy
    units = privacy["units"]
    assert units["client"]["epsilon"] == epsilon({Release(0.7, 1.0): 4}, 1e-3)
    assert units["example"]["epsilon"] == epsilon({Release(0.8, 0.25): units["example"]["releases"]}, 1e-4)
    assert privacy["unit"] == "both"
    assert privacy["epsilon"] == max(unit["epsilon"] for unit in units.values())


def test_an_adaptive_norm_moves_in_public_and_costs_nothing_more(tmp_path: Path) -> None:
    adaptive = CLIENT | {"clipping": "adaptive", "clipping_norm": 50.0, "clipping_lr": 0.5} | SEEDED
    result = run(job(adaptive, federation={"rounds": 6}), tmp_path / "run")
    assert result.privacy["epsilon"] == epsilon({Release(0.7, 1.0): 6}, 1e-3)
    assert result.privacy["last_clipping_norm"] < 25


def request(setting: Job, population: Population, round: int = 1) -> TrainRequest:
    from atoll.learning.learner import Learner
    from atoll.tasks import task_named

    data_info = population.roster(setting).data_info[0]
    learner = Learner.of(setting, task_named(setting.task.name), data_info)
    return TrainRequest(setting.canonical, setting.hash, round, data_info, learner.initial(), run="run")


def test_a_site_whose_budget_is_spent_says_no_by_name(tmp_path: Path) -> None:
    setting = job(EXAMPLE, data=CLASSES)
    population = Population.of(setting)
    dp_plan = dp_plan_of(setting, "example")
    assert dp_plan is not None
    enough = epsilon({dp_plan.event: 8}, 1e-4)
    site = Site(population, ledgers=PrivacyLedgers(tmp_path, Budget(epsilon=enough, delta=1e-4)))
    kinds = []
    for round in (1, 2, 3):
        [reply] = site.answer(request(setting, population, round), ["client-0001"])
        kinds.append(type(reply))
    assert kinds == [Update, Update, Failure]
    assert isinstance(reply, Failure)
    assert reply.reason == "the site's privacy budget for this client's data is spent"
    # Another run, another job: the same data has still spent its budget.
    again = Site(population, ledgers=PrivacyLedgers(tmp_path, Budget(epsilon=enough, delta=1e-4)))
    other = job(EXAMPLE, data=CLASSES, train={"lr": 0.5})
    [reply] = again.answer(request(other, population), ["client-0001"])
    assert isinstance(reply, Failure)


def test_an_update_tells_nothing_but_its_noised_tensors(tmp_path: Path) -> None:
    setting = job(EXAMPLE)
    population = Population.of(setting)
    site = Site(population, ledgers=PrivacyLedgers(tmp_path))
    [update] = site.answer(request(setting, population), ["client-0000"])
    assert isinstance(update, Update)
    assert update.num_examples == 1
    assert {name: float(value) for name, value in update.states.items()} == {
        "train_loss.sum": 0.0, "train_loss.count": 0.0, "privacy.rounds": 1.0,
    }  # fmt: skip
    [hello] = [h for h in site.hello(setting) if h.client == "client-0000"]
    assert hello.num_examples == 0


def test_one_example_that_is_not_finite_spoils_no_update(tmp_path: Path) -> None:
    from atoll.client.dp.poisson import private_training
    from atoll.client.heads.feature_table import ClientRows, FeatureTable
    from atoll.client.heads.layers import LOSSES
    from atoll.client.heads.train import HeadTrainingConfig, train_heads

    setting = job(EXAMPLE | {"sampling_rate": 1.0, "seeded_noise": True})
    dp_plan = dp_plan_of(setting, "example")
    assert dp_plan is not None
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    import numpy as np

    head = {"head.weight": torch.zeros(3, 5), "head.bias": torch.zeros(3)}
    local = HeadTrainingConfig(
        setting, LOSSES["softmax"], 1, per_example=private_training(setting, dp_plan, 1, {})
    )

    def trained(rows: list[int], spoilt: torch.Tensor) -> dict[str, torch.Tensor]:
        examples = FeatureTable.of(spoilt, targets)
        return train_heads(
            head, examples, [ClientRows("c", np.array(rows), np.array(rows, dtype=np.uint64))], local
        )[0].delta

    for bad in (float("nan"), float("inf"), 1e30):
        spoilt = features.clone()
        spoilt[5] = bad
        without, with_it = trained([0, 1, 2, 3, 4], features), trained([0, 1, 2, 3, 4, 5], spoilt)
        for name in head:
            torch.testing.assert_close(with_it[name], without[name], rtol=1e-5, atol=1e-6)


def test_a_real_federation_takes_no_seeded_noise_and_wants_the_classes() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.seeded_noise: anybody who has the job can subtract"):
        validate_for_deployment(job(CLIENT | SEEDED))
    with pytest.raises(ConfigError, match=r"data\.classes: missing"):
        validate_for_deployment(job(CLIENT))
    validate_for_deployment(job(CLIENT, data=CLASSES))


def test_the_result_is_json_that_holds_no_infinity(tmp_path: Path) -> None:
    run(job(CLIENT | {"noise_multiplier": 0.01}), tmp_path / "run", report=True)
    privacy = json.loads((tmp_path / "run" / "result.json").read_text())["privacy"]
    assert privacy["epsilon"] is None
    assert "no finite epsilon" in (tmp_path / "run" / "report.html").read_text()


DISTRIBUTED: dict[str, dict[str, Any]] = {
    "example": {"privacy": EXAMPLE | {"where": "distributed"}},
    "client": {"privacy": CLIENT | {"where": "distributed"}},
    "nobody": {"privacy": {"unit": "none"}, "federation": {"secure_aggregation": True}},
}


def distributed(which: str, **privacy: Any) -> Job:
    tables = DISTRIBUTED[which]
    extra = privacy if which != "nobody" else {}
    return job(tables["privacy"] | extra, federation=tables.get("federation", {}))


@pytest.mark.parametrize("which", DISTRIBUTED)
def test_a_secure_sum_under_masks_has_the_bits_of_the_sum_without(which: str, tmp_path: Path) -> None:
    from atoll.server.run.run_job import run_job
    from atoll.sim.engines.engine import cached_test_set
    from atoll.sim.engines.inline import LoopTransport

    setting = distributed(which, **SEEDED)
    plain = run(setting, tmp_path / "plain")
    population = Population.of(setting)
    carrier = LoopTransport.of(population, PrivacyLedgers(tmp_path / "masked" / "ledgers"))
    carrier.uses_masking = True
    masked = run_job(setting, carrier, tmp_path / "masked", cached_test_set(population, None))
    assert masked.model_sha256 == plain.model_sha256
    assert masked.privacy["epsilon"] == plain.privacy["epsilon"]
    assert [line["trained"] for line in masked.rounds] == [4] * 4


def test_a_secure_sum_without_a_promise_is_the_mean_by_examples(tmp_path: Path) -> None:
    secure = run(distributed("nobody"), tmp_path / "secure")
    plain = run(job({"unit": "none"}), tmp_path / "plain")
    for a, b in zip(secure.rounds, plain.rounds, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["metrics"]["loss"] == pytest.approx(b["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize("which", ["example", "client"])
def test_distributed_noise_is_charged_in_the_clients_own_ledgers(which: str, tmp_path: Path) -> None:
    result = run(distributed(which), tmp_path / "run")
    took_part = Counter(name for line in result.rounds for name in line["cohort"])
    cost = Release(0.8, 0.25) if which == "example" else Release(0.7, 1.0)
    delta = 1e-4 if which == "example" else 1e-3
    for name, times in took_part.items():
        file = f"{name}.jsonl" if which == "example" else f"{name}.client.jsonl"
        ledger = Ledger.open(tmp_path / "run" / "ledgers" / file, f"{which} of {name}")
        assert dict(ledger.spent) == {cost: times}
    assert result.privacy["where"] == "distributed"
    assert result.privacy["epsilon"] == epsilon({cost: max(took_part.values())}, delta)


@pytest.mark.parametrize("gone", [0, 1])
def test_the_shares_of_the_noise_make_the_whole_whoever_leaves(gone: int) -> None:
    """With all of the threshold there the deviation is z C; with more clients it is more, never less."""
    from atoll.privacy.noise import entropy
    from atoll.privacy.secagg_encoding import FixedPointCodec

    setting = distributed("client")
    dp_plan = dp_plan_of(setting, "client")
    assert dp_plan is not None
    numbers, clients, threshold = 200_000, 6, 5
    import numpy as np

    total = np.zeros(numbers, dtype=np.uint64)
    for _ in range(clients - gone):
        total += FixedPointCodec.of(dp_plan, numbers, threshold, entropy).integers(np.zeros(numbers))
    deviation = float(FixedPointCodec.of(dp_plan, numbers, threshold, entropy).values(total).std())
    whole = 0.7 * 0.5
    assert deviation == pytest.approx(whole * ((clients - gone) / threshold) ** 0.5, rel=0.01)
    assert deviation > 0.99 * whole


@pytest.mark.parametrize(
    ("which", "kind", "said"),
    [
        ("client", UnmaskedSumRequest, "under masks only"),
        ("client", TrainRequest, "under masks only"),
        ("example", TrainRequest, "under masks only"),
        ("nobody", TrainRequest, "under masks only"),
        ("client", EvaluateRequest, "measures nothing"),
    ],
)
def test_a_real_site_does_not_do_what_a_curious_server_asks(
    which: str, kind: type[ModelRequest], said: str, tmp_path: Path
) -> None:
    setting = distributed(which)
    population = Population.of(setting)
    site = Site(population, discreet=True, ledgers=PrivacyLedgers(tmp_path))
    plain = request(setting, population)
    of_sum: dict[str, Any] = {"threshold": 3, "attempt": 1} if kind is UnmaskedSumRequest else {}
    asked = kind(**origin_of(plain), tensors=plain.tensors, **of_sum)
    [reply] = site.answer(asked, ["client-0000"])
    assert isinstance(reply, Failure) and said in reply.reason
    assert not list(tmp_path.iterdir())  # nothing was charged, for nothing was sent


@pytest.mark.parametrize("privacy", [{"unit": "none"}, CLIENT], ids=["no promise", "a trusted server"])
def test_a_site_with_a_budget_takes_no_job_that_shows_updates(
    privacy: dict[str, Any], tmp_path: Path
) -> None:
    setting = job(privacy)
    site = Site(Population.of(setting), ledgers=PrivacyLedgers(tmp_path, Budget(epsilon=8.0, delta=1e-5)))
    assert all("no noise before the server sees" in hello.refusal for hello in site.hello(setting))


@pytest.mark.parametrize("which", ["example", "client"])
@pytest.mark.parametrize("real", [{"discreet": True}, {}], ids=["a real site", "a site with a budget"])
def test_a_site_takes_no_seeded_noise_whoever_asks(which: str, real: dict[str, Any], tmp_path: Path) -> None:
    """The server's own check is not relied on: 0 of 3 updates are sent, and nothing is charged."""
    privacy = EXAMPLE if which == "example" else CLIENT | {"where": "distributed"}
    setting = job(privacy | SEEDED, data=CLASSES)
    population = Population.of(setting)
    site = Site(population, ledgers=PrivacyLedgers(tmp_path, Budget(epsilon=8.0, delta=1e-5)), **real)
    assert all("takes no seeded noise" in hello.refusal for hello in site.hello(setting))
    for round in (1, 2, 3):
        [reply] = site.answer(request(setting, population, round), ["client-0001"])
        assert isinstance(reply, Failure) and "takes no seeded noise" in reply.reason
    assert not list(tmp_path.iterdir())


def test_the_site_itself_must_look_at_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hole put back a site sends what anybody can take the noise off, and spends no budget."""
    monkeypatch.setattr(Site, "_refused_noise", lambda self, job: "")
    setting = job(EXAMPLE | SEEDED, data=CLASSES)
    population = Population.of(setting)
    site = Site(population, ledgers=PrivacyLedgers(tmp_path, Budget(epsilon=0.1, delta=1e-5)))
    [reply] = site.answer(request(setting, population), ["client-0001"])
    assert isinstance(reply, Update)


def test_an_update_that_is_no_number_is_set_aside_where_only_examples_are_promised_privacy(
    tmp_path: Path,
) -> None:
    setting = job(EXAMPLE | SEEDED, federation={"cohort": 6, "rounds": 2})
    population = Population.of(setting)
    ledgers = PrivacyLedgers(tmp_path / "run" / "ledgers")
    carrier = Hostile.of(population, ledgers=ledgers)
    result = run_job(setting, carrier, tmp_path / "run", cached_test_set(population, None), report=False)
    assert result.rounds[0]["set_aside"]["client-0000"].startswith("tensor head.")
    assert result.final["server"]["accuracy"] > 0
