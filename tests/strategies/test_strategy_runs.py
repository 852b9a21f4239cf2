"""Whole runs of every strategy against hostile clients or unlike shards: engines, kills, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.client.training.local_steps import accumulated_steps
from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import Job
from atoll.job.train import TrainSection
from atoll.protocol.messages import LOCAL_STEPS, RECEIVED_LOSS, Update
from atoll.protocol.requests import Request
from atoll.protocol.stacked_updates import stacked
from atoll.server.job_checks import check_named
from atoll.server.rounds.validation import validate_updates
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.process_pool import books_in
from atoll.sim.population.population import Population
from atoll.sim.search.space import default_space
from atoll.strategies import build_strategy
from atoll.strategies.fedexp import FedExp, extrapolation
from atoll.strategies.fednova import FedNova
from atoll.strategies.mean import weighted_mean
from atoll.strategies.options import HOSTILE_OPTIONS
from atoll.strategies.strategy import tensors_for_clients
from tests.sim.test_simulation import DIGITS, Breaks, run
from tests.support.small import few_pictures, image_job

NEW = (*HOSTILE_OPTIONS, "fltrust", "fednova", "fedexp", "scaffold", "feddyn", "qffl", "afl")
MIXED = {
    "krum": {"options": {"mixing": True}},
    "diloco": {"lr_schedule": "cosine", "lr_warmup": 1},
    "scaffold": {"lr_schedule": "step", "lr_step": 1},
    "fltrust": {"options": {"root": "client-0002"}},
}
"""One of them also mixes, and others' learning rates change."""


def section(name: str) -> dict[str, Any]:
    return {"name": name, **MIXED.get(name, {})}


def of_pixels(federation: dict[str, Any], **tables: Any) -> Job:
    """Digits, whose pixels are the features."""
    pixels = {"backbone": {"name": "raw:pixels", "image_size": 8}, "train": {"lr": 1.0, "batch_size": 16}}
    return Job.parse(DIGITS | pixels | {"federation": federation} | tables, origin="test")


def of_eight(name: str, **tables: Any) -> Job:
    federation = {"clients": 8, "cohort": 7, "quorum": 1.0, "rounds": 3} | tables.pop("federation", {})
    return of_pixels(federation, **{"strategy": section(name), **tables})


@pytest.mark.parametrize("name", (*NEW, "diloco"))
def test_every_engine_and_a_resumed_run_give_the_same_bits(tmp_path: Path, name: str) -> None:
    few = few_pictures(160, classes=4) | {"partition": {"kind": "dirichlet", "alpha": 0.5}}
    setting = of_eight(name, data=few, evaluate={"every": 3})
    whole = run(setting, tmp_path / "whole").model_sha256
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole
    population, (_, memory) = Population.of(setting), books_in(tmp_path / "r")
    stopped = Breaks.of(population, memory=memory)
    with pytest.raises(KeyboardInterrupt):
        run_job(setting, stopped, tmp_path / "r", cached_test_set(population, None))
    assert run(setting, tmp_path / "r", resume=True).model_sha256 == whole


@pytest.mark.parametrize("name", NEW)
def test_whole_models_merge_too(tmp_path: Path, name: str) -> None:
    setting = image_job(
        "squeezenet1_1",
        data=few_pictures(14, classes=2),
        tune={"method": "full"},
        strategy=section(name),
        federation={"clients": 7, "quorum": 1.0, "rounds": 1},
    )
    result = run(setting, tmp_path)
    assert result.clients_trained == 7 and result.rounds[0]["set_aside"] == {}


@pytest.mark.parametrize("name", NEW)
def test_the_order_of_a_models_tensors_changes_no_bit(name: str) -> None:
    """A checkpoint gives them back by name, a learner in the network's order."""
    draw = torch.Generator().manual_seed(5)
    shapes = {"w": (3, 5), "b": (3,), "a": (4,)}
    model = {n: torch.randn(shape, generator=draw) for n, shape in shapes.items()}
    strategy = build_strategy(Job.parse(DIGITS | {"strategy": section(name)}, origin="test").strategy)
    sent = tensors_for_clients(strategy, strategy.begin(model))
    updates = [
        replace(
            update(0.0, 9, 2.0, f"client-000{c}"),
            delta={n: torch.randn(p.shape, generator=draw) for n, p in model.items()},
            strategy_tensors={n: torch.randn(t.shape, generator=draw) for n, t in sent.items()},
        )
        for c in range(7)
    ]
    first, state = strategy.merge(model, updates, strategy.begin(model))
    again = dict(sorted(first.items()))
    one, two = strategy.merge(first, updates, state), strategy.merge(again, updates, state)
    assert all(torch.equal(one[0][name], two[0][name]) for name in model)
    assert one[1].keys() == two[1].keys()


@pytest.mark.parametrize("name", NEW)
def test_what_sees_only_a_mean_refuses_a_strategy_by_name(name: str) -> None:
    client = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
    only_a_mean = rf"strategy\.name: expected one of fedavg, .*, found '{name}': of the updates nothing"
    for tables in ({"privacy": client}, {"federation": {"secure_aggregation": True}}):
        with pytest.raises(ConfigError, match=only_a_mean):
            of_eight(name, **tables)


class Hostile(InlineTransport):
    """Two clients send their delta backwards, and thirty times as long."""

    def send_and_receive(self, request: Request, names: Any, timeout: float) -> Any:
        for reply in super().send_and_receive(request, names, timeout):
            hostile = isinstance(reply, Update) and reply.client in ("client-0001", "client-0004")
            yield replace(reply, delta={n: -30 * d for n, d in reply.delta.items()}) if hostile else reply


def accuracy(name: str, options: dict[str, Any], out: Path) -> float:
    """Of ten rounds of eleven clients, two of them hostile."""
    federation = {"clients": 11, "quorum": 1.0, "rounds": 10}
    strategy = {"name": name} | ({"options": options} if options else {})
    data = {"source": "digits", "partition": {"kind": "iid"}}
    setting = of_pixels(federation, data=data, strategy=strategy, evaluate={"every": 10})
    population = Population.of(setting)
    result = run_job(setting, Hostile.of(population), out, cached_test_set(population, None), report=False)
    return float(result.rounds[-1]["metrics"]["accuracy"])


def test_rules_learn_where_two_clients_of_eleven_send_their_deltas_backwards(tmp_path: Path) -> None:
    led_astray = accuracy("fedavg", {}, tmp_path / "fedavg")
    for name in HOSTILE_OPTIONS:
        options = {"hostile": 2} | ({"clipping_norm": 0.3} if "clipping" in name or "norm" in name else {})
        found = accuracy(name, options, tmp_path / name)
        assert found > led_astray + 0.15, name


def test_a_search_by_itself_leaves_a_rule_against_hostile_clients_as_it_is() -> None:
    assert "strategy.name" in {one.key for one in default_space(of_eight("fedexp")).keys}
    assert "strategy.name" not in {one.key for one in default_space(of_eight("krum")).keys}


EXAMPLE = {"unit": "example", "noise_multiplier": 0.8, "delta": 1e-4, "sampling_rate": 0.25}


def test_noised_updates_of_clients_merge_by_a_median(tmp_path: Path) -> None:
    setting = of_eight("coordinate-median", privacy=EXAMPLE | {"seeded_noise": True})
    assert run(setting, tmp_path).privacy


@pytest.mark.parametrize(
    ("name", "tables", "pattern"),
    [
        ("krum", {"federation": {"cohort": 8, "quorum": 0.5}},
         r"strategy\.options\.hostile: krum needs 5 clients against 1 hostile \(2 \* hostile \+ 3\)"
         r", and federation\.quorum = 0\.5 lets a round count with 4 of 8"),
        ("bulyan", {"strategy": {"name": "bulyan", "options": {"hostile": 2}}},
         r"bulyan needs 11 clients against 2 hostile \(4 \* hostile \+ 3\)"),
        ("krum", {"federation": {"cohort": None, "cohort_rate": 0.9}},
         r"federation\.cohort_rate: draws cohorts of any size, and krum needs 5"),
        ("krum", {"tune": {"head_init": "ridge"}}, r"tune\.head_init: adds up whatever clients send"),
        ("multi-krum", {"strategy": {"name": "multi-krum", "options": {"selected": 7}}},
         r"strategy\.options\.selected: expected at most 6 of 7 clients with hostile = 1, found 7"),
        ("krum", {"strategy": {"name": "krum", "options": {"hostil": 1}}},
         r"strategy\.options\.hostil: unknown key, did you mean 'hostile'"),
        ("krum", {"strategy": {"name": "krum", "options": {"hostile": -1}}},
         r"strategy\.options\.hostile: expected greater than or equal to 0, found -1"),
        ("krum", {"strategy": {"name": "krum", "options": {"smoothing": 1.0}}}, r"smoothing: unknown key"),
        ("fedexp", {"strategy": {"name": "fedexp", "lr": 0.1}}, r"strategy\.lr: fedexp does not use it"),
        ("fedavg", {"strategy": {"name": "fedavg", "lr_schedule": "cosine", "lr_warmup": 3}},
         r"strategy\.lr_warmup: expected less than federation\.rounds = 3, found 3"),
        ("fedavg", {"strategy": {"name": "fedavg", "lr_warmup": 2}}, r"lr_warmup has no meaning without"),
        ("fedavg", {"strategy": {"name": "fedavg", "lr_schedule": "step"}}, r"'step' needs lr_step"),
        ("fedavg", {"strategy": {"name": "fedavg", "lr_schedule": "cosine", "lr_decay": 0.5}},
         r"lr_decay has no meaning with lr_schedule = 'cosine', only with 'step'"),
        ("qffl", {"strategy": {"name": "qffl", "options": {"q": -1}}}, r"options\.q: expected greater than"),
        ("qffl", {"strategy": {"name": "qffl", "lr": 0.1}}, r"strategy\.lr: qffl does not use it"),
        ("afl", {"strategy": {"name": "afl", "options": {"lambda_lr": 0}}}, r"lambda_lr: expected greater"),
        ("fednova", {"privacy": EXAMPLE}, r"strategy\.name: under example-level privacy .* is fedavg"),
    ],
)  # fmt: skip
def test_what_a_strategy_cannot_merge_is_refused_before_the_run(
    name: str, tables: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        check_named(of_eight(name, **tables))
    assert "\n" not in str(caught.value)


def update(value: float, examples: int, steps: float | None = None, client: str = "a") -> Update:
    loss = {f"train_loss.{part}": torch.zeros((), dtype=torch.float64) for part in ("sum", "count")}
    told = {} if steps is None else {LOCAL_STEPS: torch.tensor(steps, dtype=torch.float64)}
    told[RECEIVED_LOSS] = torch.tensor(examples / 8, dtype=torch.float64)
    return Update(client, 1, {"w": torch.tensor([value])}, examples, loss | told)


def test_fednova_divides_each_delta_by_its_steps() -> None:
    # p = 1/4, 3/4; steps 1 and 3, so tau_eff = 1/4 + 9/4 = 2.5; 2.5 * (1/4 * 2/1 + 3/4 * 6/3) = 2.5 * 2 = 5
    two = [update(2.0, 10, 1.0, "a"), update(6.0, 30, 3.0, "b")]
    for updates in (two, stacked(two)):
        merged, _ = FedNova().merge({"w": torch.tensor([1.0])}, updates, {})
        assert merged["w"].item() == 6.0


def test_fednova_of_equal_steps_is_the_mean_and_says_what_is_missing() -> None:
    two = [update(2.0, 10, 4.0, "a"), update(6.0, 30, 4.0, "b")]
    merged, _ = FedNova().merge({"w": torch.tensor([0.0])}, two, {})
    assert torch.equal(merged["w"].double(), weighted_mean(two)["w"])
    with pytest.raises(InconsistentUpdates, match="b sent no local_steps"):
        FedNova().merge({"w": torch.tensor([0.0])}, [two[0], update(6.0, 30, None, "b")], {})


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_weights_of_local_gradients_are_those_of_torchs_sgd(momentum: float) -> None:
    """Gradients of 1 everywhere: the model has then moved by the sum of their weights."""
    at = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([at], lr=1.0, momentum=momentum)
    for _ in range(6):
        at.grad = -torch.ones_like(at)
        optimizer.step()
    train = TrainSection(batch_size=16, epochs=2, momentum=momentum)
    assert accumulated_steps(33, train) == pytest.approx(at.item())


def test_a_client_that_claims_no_steps_is_set_aside_by_name() -> None:
    model = {"w": torch.zeros(1)}
    good, bad = update(1.0, 3, 2.0, "a"), update(1.0, 3, 0.0, "b")
    validated = validate_updates([good, bad], ["a", "b"], model, 1)
    assert [u.client for u in validated.updates] == ["a"]
    assert validated.set_aside == {"b": "metric state local_steps: expected more than 0, found 0"}


def test_fedexp_goes_further_where_deltas_disagree() -> None:
    # The mean of (3, 1) and (-1, 1) is (1, 1): (10 + 2) / 2 / (2 * (2 + 1)) = 1.
    # Of (5, 1) and (-3, 1) it is the same: (26 + 10) / 2 / (2 * (2 + 1)) = 3, and (1, 1) * 3 = (3, 3).
    for first, second, expected in (((3.0, 1.0), (-1.0, 1.0), 1.0), ((5.0, 1.0), (-3.0, 1.0), 3.0)):
        two = [Update(n, 1, {"w": torch.tensor(d)}, 4) for n, d in (("a", first), ("b", second))]
        assert extrapolation(two, weighted_mean(two), 1.0) == pytest.approx(expected)
        for updates in (two, stacked(two)):
            merged, _ = FedExp(1.0).merge({"w": torch.zeros(2)}, updates, {})
            assert merged["w"].tolist() == pytest.approx([expected, expected])


def test_fedexp_never_takes_less_than_the_mean() -> None:
    same = [Update(name, 1, {"w": torch.tensor([2.0])}, n) for name, n in (("a", 1), ("b", 9))]
    assert FedExp().merge({"w": torch.zeros(1)}, same, {})[0]["w"].item() == pytest.approx(2.0)
    still = [Update("a", 1, {"w": torch.zeros(1)}, 1)]
    assert FedExp(0.0).merge({"w": torch.zeros(1)}, still, {})[0]["w"].item() == 0.0
