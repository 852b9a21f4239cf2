"""`federation.weights`: what an update weighs in the mean, one by one, as a stack and in a secure sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.dp.secure_aggregation import contributions
from atoll.errors import ConfigError
from atoll.job.federation import WEIGHTED, FederationSection
from atoll.job.job import Job, StrategySection
from atoll.protocol.messages import LOCAL_STEPS, Update
from atoll.protocol.stacked_updates import stacked
from atoll.server.rounds.aggregation import MergeWeights
from atoll.strategies import build_strategy
from atoll.strategies.mean import weighted_mean
from tests.sim.test_simulation import run
from tests.strategies.test_strategy_runs import of_pixels

COUNTS = (1, 30, 500)
VALUES = (1.0, 2.0, 5.0)
CHOICES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "examples": ({}, COUNTS), "equal": ({}, (1, 1, 1)), "capped": ({"weight_cap": 100}, (1, 30, 100)),
}  # fmt: skip


def updates() -> list[Update]:
    states = {name: torch.tensor(1.0, dtype=torch.float64) for name in ("train_loss.sum", "train_loss.count")}
    return [Update(f"c{n}", 1, {"w": torch.tensor([v])}, n, dict(states))
            for v, n in zip(VALUES, COUNTS, strict=True)]  # fmt: skip


@pytest.mark.parametrize("weights", sorted(CHOICES))
def test_the_mean_is_numpys_of_these_weights(weights: str) -> None:
    more, expected = CHOICES[weights]
    federation = FederationSection(weights=weights, **more)  # type: ignore[arg-type]
    wanted = np.average(VALUES, weights=expected)
    for some in (updates(), stacked(updates())):
        weighed, kept = MergeWeights(federation)(some, 1, {}, {})
        assert kept == {}
        assert float(weighted_mean(weighed)["w"]) == pytest.approx(wanted, rel=1e-15)
    sums = sum(vector for _, vector in contributions(updates(), None, federation))
    assert isinstance(sums, torch.Tensor)
    assert float(sums[0] / sums[1]) == pytest.approx(wanted, rel=1e-15) and float(sums[-1]) == 3


def test_an_update_of_no_examples_weighs_nothing() -> None:
    for weights, (more, _) in CHOICES.items():
        assert FederationSection(weights=weights, **more).merge_weight(0) == 0  # type: ignore[arg-type]


def test_a_run_goes_by_the_weights(tmp_path: Path) -> None:
    def model(**federation: Any) -> str:
        setting = of_pixels(
            {"clients": 6, "cohort": 4, "rounds": 2} | federation,
            data={"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.3}},
        )
        found = run(setting, tmp_path / str(len(list(tmp_path.iterdir()))))
        assert isinstance(found.model_sha256, str)
        return found.model_sha256

    usual = model()
    assert model(weights="capped", weight_cap=10_000) == usual != model(weights="equal")


@pytest.mark.parametrize("name", sorted(WEIGHTED))
def test_every_strategy_on_the_list_goes_by_the_weights(name: str) -> None:
    strategy = build_strategy(StrategySection(name=name))
    model, moves = {"w": torch.zeros(1)}, []
    for counts in (COUNTS, (1, 1, 1)):
        told = {"states": {LOCAL_STEPS: torch.tensor(1.0, dtype=torch.float64)}}
        some = [replace(u, num_examples=n, **told) for u, n in zip(updates(), counts, strict=True)]
        moves.append(strategy.merge(model, some, strategy.begin(model))[0]["w"].item())
    assert moves[0] != moves[1]


def table(**tables: Any) -> dict[str, Any]:
    return {"name": "t", "seed": 5, "task": {"name": "text-classification"}, "data": {"source": "x"},
            "backbone": {"name": "hf:x"}} | tables  # fmt: skip


CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"federation": {"weight_cap": 5}}, "weight_cap has no meaning without weights = 'capped'"),
        ({"federation": {"weights": "capped"}}, "'capped' needs weight_cap"),
        (
            {"federation": {"weights": "equal"}, "strategy": {"name": "reptile"}},
            "weights: reptile",
        ),
        (
            {"federation": {"weights": "examples"}, "privacy": CLIENT},
            "under a promise clients weigh",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Job.parse(table(**tables), origin="job")


def test_equal_weights_may_be_said_under_a_promise() -> None:
    job = Job.parse(table(federation={"weights": "equal"}, privacy=CLIENT), origin="job")
    assert job.federation.weights == "equal"
