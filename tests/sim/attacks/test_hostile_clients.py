"""Hostile clients in simulation: byzfl's figures, the papers' definitions, and whole runs as oracles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.report.page import page
from atoll.report.run_result import RunResult
from atoll.report.text import who_was_hostile
from atoll.server.events import ignore_events
from atoll.server.job_checks import validate_for_deployment
from atoll.sim.attacks.hostile_clients import hostile_names
from atoll.sim.attacks.hostile_updates import alie, inner_product, min_max
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population, client_names, number_of

CLIENTS = 6


def job(strategy: str = "fedavg", **tables: Any) -> Job:
    """Heads on few digits' pixels."""
    return Job.parse(
        {
            "name": "hostile",
            "seed": 4,
            "task": {"name": "image-classification"},
            "data": {"source": "digits", "classes": [str(digit) for digit in range(10)]},
            "backbone": {"name": "raw:pixels", "image_size": 8},
            "train": {"lr": 0.5, "batch_size": 32},
            "federation": {"clients": CLIENTS, "rounds": 2},
            "strategy": {"name": strategy},
        }
        | tables,
        origin="test",
    )


def drawn(clients: int, numbers: int = 30) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(clients).normal(size=(clients, numbers)))


@pytest.mark.parametrize("clients", [2, 5, 16])
def test_collusions_are_byzfls(clients: int) -> None:
    byzfl = pytest.importorskip("byzfl", reason="an oracle of the extra dev")
    rows = drawn(clients)
    theirs = byzfl.InnerProductManipulation(7.0), byzfl.ALittleIsEnough(1.5)
    for ours, attack in zip((inner_product(rows, 7.0), alie(rows, 1.5)), theirs, strict=True):
        assert ours.tolist() == pytest.approx(attack(rows.numpy()).tolist(), abs=1e-9)


@pytest.mark.parametrize("clients", [2, 3, 9])
def test_min_max_is_the_farthest_row_that_no_honest_row_is_too_far_from(clients: int) -> None:
    rows = drawn(clients)
    mean, deviations = rows.mean(dim=0), rows.std(dim=0)
    largest = max(float((a - b).norm()) for a in rows for b in rows)

    def fits(gamma: float) -> bool:
        return all(float((mean - gamma * deviations - row).norm()) <= largest for row in rows)

    low, high = 0.0, 100.0  # the paper's search, by halves
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    assert low > 0.1
    assert min_max(rows).tolist() == pytest.approx((mean - low * deviations).tolist(), abs=1e-9)


def ran(folder: Path, engine: str = "inline", **tables: Any) -> RunResult:
    setting = job(**tables)
    out = folder / f"{engine}-{setting.hash[:12]}"
    return simulate(setting, out, engine=engine, on_event=ignore_events, report=False)


def test_hostile_clients_are_chosen_by_the_seed_and_as_many_as_asked() -> None:
    attack = {"kind": "sign-flip", "clients": 2}
    chosen = hostile_names(job(attack=attack), client_names(CLIENTS))
    assert len(chosen) == 2 and chosen == hostile_names(job(attack=attack), client_names(CLIENTS))
    others = {tuple(hostile_names(job(attack=attack, seed=s), client_names(CLIENTS))) for s in range(30)}
    assert len(others) > 10
    assert hostile_names(job(), client_names(CLIENTS)) == []


class Recorded:
    """What a strategy merges, kept."""

    def __init__(self) -> None:
        self.updates: list[Any] = []

    def begin(self, model: Any) -> Any:
        return {}

    def plan(self, state: Any, round: int) -> Any:
        return {}

    def merge(self, model: Any, updates: Any, state: Any) -> Any:
        self.updates = list(updates)
        return model, state


def first_round(folder: Path, **attack: Any) -> dict[str, torch.Tensor]:
    """Each client's delta of the first round as one row."""
    seen, name = Recorded(), str(attack.get("kind", "none"))
    setting = job(attack=attack, federation={"clients": CLIENTS, "rounds": 1})
    simulate(setting, folder / name, on_event=ignore_events, report=False, strategy=seen)
    return {
        update.client: torch.cat([t.reshape(-1) for _, t in sorted(update.delta.items())])
        for update in seen.updates
    }


def test_what_the_server_merges_is_what_hostile_clients_send(tmp_path: Path) -> None:
    honest = first_round(tmp_path)
    hostile = hostile_names(job(attack={"kind": "alie", "clients": 2}), client_names(CLIENTS))
    good = torch.stack([delta for name, delta in sorted(honest.items()) if name not in hostile]).double()
    expected = {
        "sign-flip": lambda own: -3 * own,
        "inner-product": lambda own: -3 * good.mean(dim=0),
        "alie": lambda own: good.mean(dim=0) + 3 * good.std(dim=0),
        "mimic": lambda own: good[0],
        "free-rider": torch.zeros_like,
    }
    for kind, of in expected.items():
        scale = {} if kind in ("mimic", "free-rider") else {"scale": 3.0}
        sent = first_round(tmp_path, kind=kind, clients=2, **scale)
        for name, delta in sent.items():
            wanted = of(honest[name].double()) if name in hostile else honest[name].double()
            torch.testing.assert_close(delta.double(), wanted, rtol=1e-6, atol=1e-9)
    noise = first_round(tmp_path, kind="gaussian", clients=2, scale=5.0)
    drawn = torch.stack([noise[name] for name in hostile])
    assert 4 < float(drawn.std()) < 6 and not torch.equal(drawn[0], drawn[1])


def labels(setting: Job) -> list[list[str]]:
    """Each client's labels, in the order in which they were dealt."""
    population = Population.of(setting)
    return [population.dataset(setting, name)["label"] for name in client_names(CLIENTS)]


@pytest.mark.parametrize(
    ("attack", "becomes"),
    [
        ({"kind": "label-flip"}, {str(i): str(9 - i) for i in range(10)}),
        ({"kind": "backdoor", "victim": "3", "target": "8"}, {"3": "8"}),
    ],
)
def test_poisoned_labels_are_those_of_the_hostile_clients_alone(
    attack: dict[str, Any], becomes: dict[str, str]
) -> None:
    setting = job(attack=attack | {"clients": 2})
    hostile = {number_of(name) for name in hostile_names(setting, client_names(CLIENTS))}
    for number, (before, after) in enumerate(zip(labels(job()), labels(setting), strict=True)):
        wanted = [becomes.get(label, label) for label in before] if number in hostile else before
        assert after == wanted
        assert (after != before) == (number in hostile)


def test_a_robust_merge_learns_where_the_mean_does_not(tmp_path: Path) -> None:
    attack = {"kind": "sign-flip", "clients": 1, "scale": 10.0}
    accuracy = {
        name: ran(tmp_path, strategy=name, attack=attack, train={"lr": 4.0, "epochs": 5}).rounds[-1][
            "metrics"
        ]["accuracy"]
        for name in ("fedavg", "trimmed-mean")
    }
    assert accuracy["fedavg"] < 0.3 < 0.7 < accuracy["trimmed-mean"]


@pytest.mark.parametrize("kind", ["label-flip", "min-max", "gaussian"])
def test_one_by_one_and_all_at_once_have_the_same_bits_under_attack(tmp_path: Path, kind: str) -> None:
    attack = {"kind": kind, "clients": 2}
    results = [ran(tmp_path, engine, attack=attack) for engine in ("inline", "loop")]
    assert results[0].model_sha256 == results[1].model_sha256
    assert results[0].model_sha256 != ran(tmp_path).model_sha256


@pytest.mark.parametrize(
    "federation", [{"secure_aggregation": True}, {"compression": "sign", "error_feedback": True}]
)
def test_labels_are_flipped_however_updates_travel(tmp_path: Path, federation: dict[str, Any]) -> None:
    """As if the clients' own data were so."""
    tables = {"federation": {"clients": CLIENTS, "rounds": 2} | federation}
    attack = {"kind": "label-flip", "clients": 2}
    poisoned = Population.of(job(attack=attack, **tables))
    data = replace(Population.of(job(**tables)), train=poisoned.train, keys=poisoned.keys)
    flipped = simulate(
        job(**tables), tmp_path / "data", on_event=ignore_events, report=False, population=data
    )
    assert ran(tmp_path, attack=attack, **tables).model_sha256 == flipped.model_sha256
    assert flipped.model_sha256 != ran(tmp_path, **tables).model_sha256


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"attack": {"clients": 2}}, "clients has no meaning without kind"),
        ({"attack": {"kind": "mimic", "scale": 2.0}}, "scale has no meaning with kind = 'mimic'"),
        ({"attack": {"kind": "backdoor", "victim": "1"}}, "'backdoor' needs target"),
        ({"attack": {"kind": "alie", "clients": CLIENTS}}, "fewer than federation.clients = 6, found 6"),
        (
            {"attack": {"kind": "alie"}, "federation": {"clients": CLIENTS, "compression": "int8"}},
            "expected none with federation.compression, or 'label-flip'",
        ),
        (
            {
                "attack": {"kind": "label-flip"},
                "data": {"source": "digits", "partition": {"kind": "resampled", "examples": 9}},
            },
            "'resampled'",
        ),
    ],
)
def test_an_attack_that_can_not_be_is_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job(**tables)


def test_a_backdoors_class_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"attack.target: expected one of .* found 'ten'"):
        Population.of(job(attack={"kind": "backdoor", "victim": "1", "target": "ten"}))


def test_real_sites_take_no_attack() -> None:
    with pytest.raises(ConfigError, match=r"attack.kind: makes simulated clients hostile"):
        validate_for_deployment(job(attack={"kind": "sign-flip"}))


def test_the_report_says_who_was_hostile(tmp_path: Path) -> None:
    attack = {"kind": "label-flip", "clients": 2}
    result = ran(tmp_path, attack=attack)
    text = page(tmp_path / f"inline-{job(attack=attack).hash[:12]}", result)
    assert "2 of the clients were hostile, as the job asks (label-flip), and measured the model on" in text
    assert who_was_hostile(job()) == who_was_hostile(None) == ""
