"""FLANDERS against alternating least squares written out in NumPy, and its filter over rounds and in runs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import StrategySection
from atoll.protocol.messages import Update
from atoll.protocol.stacked_updates import stacked
from atoll.server.job_checks import check_named
from atoll.strategies import build_strategy
from atoll.strategies.robust.matrix_autoregression import forecast
from atoll.strategies.strategy import State
from tests.strategies.test_strategy_runs import of_eight, of_pixels, run

Past = dict[str, np.ndarray]


def by_hand(past: np.ndarray, ridge: float, iterations: int) -> np.ndarray:
    """A [numbers, numbers] and B [clients, clients] in turns, from the past [rounds, clients, numbers]."""
    if len(past) == 1:
        return past[-1]
    size = np.sqrt(np.mean(past**2)) or 1.0
    theta = [one.T / size for one in past]
    numbers, clients = theta[0].shape
    b = np.eye(clients)
    for _ in range(iterations):
        top, bottom = np.zeros((numbers, numbers)), ridge * np.eye(numbers)
        for before, after in pairwise(theta):
            top += after @ (before @ b).T
            bottom += (before @ b) @ (before @ b).T
        a = top @ np.linalg.inv(bottom)
        top, bottom = np.zeros((clients, clients)), ridge * np.eye(clients)
        for before, after in pairwise(theta):
            top += (a @ before).T @ after
            bottom += (a @ before).T @ (a @ before)
        b = np.linalg.inv(bottom) @ top
    return np.asarray(size * (a @ theta[-1] @ b).T)


@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([0.1, 1.0]),
)
def test_the_forecast_is_that_of_both_matrices_written_out(
    seed: int, rounds: int, clients: int, numbers: int, ridge: float
) -> None:
    draw = np.random.default_rng(seed)
    past = draw.normal(size=(rounds, clients, numbers)) + 2 * draw.normal(size=numbers)
    found = forecast(torch.from_numpy(past), ridge, iterations=7).numpy()
    np.testing.assert_allclose(found, by_hand(past, ridge, 7), rtol=1e-7, atol=1e-9)


def test_nothing_leads_to_nothing() -> None:
    assert forecast(torch.zeros(4, 3, 2, dtype=torch.float64), 1.0, 5).abs().max() == 0


def round_by_hand(
    deltas: Mapping[str, np.ndarray], model: np.ndarray, merged: list[np.ndarray], past: Past, hostile: int
) -> tuple[list[str], np.ndarray]:
    """Who is kept of a round, and the model after it; `merged` and `past` get the round, whole, no window."""
    names = sorted(deltas)
    rounds = len(merged)
    columns = [[past[n][s] if n in past else merged[s] for n in names] for s in range(rounds)]
    expected = by_hand(np.array(columns), 1.0, 4) if rounds else np.array([model for _ in names])
    scores = [np.linalg.norm(model + deltas[n] - expected[i]) for i, n in enumerate(names)]
    kept = [names[i] for i in np.argsort(scores, kind="stable")[: len(names) - hostile]]
    after = model + np.mean([deltas[n] for n in sorted(kept)], axis=0)
    for name in {*past, *kept}:
        row = model + deltas[name] if name in kept else after
        past[name] = np.array([*past.get(name, merged), row])
    merged.append(after)
    return sorted(kept), after


def sent(deltas: Mapping[str, np.ndarray]) -> list[Update]:
    return [
        Update(name, 1, {"w": torch.from_numpy(row[:3]), "b": torch.from_numpy(row[3:])}, 1 + len(name))
        for name, row in sorted(deltas.items())
    ]


def as_model(numbers: np.ndarray) -> dict[str, torch.Tensor]:
    return {"w": torch.from_numpy(numbers[:3]), "b": torch.from_numpy(numbers[3:])}


def as_numbers(model: Mapping[str, torch.Tensor]) -> np.ndarray:
    return torch.cat([model["w"], model["b"]]).numpy()


@pytest.mark.parametrize("form", [list, stacked])
def test_rounds_of_changing_cohorts_go_as_by_hand(form: Any) -> None:
    draw = np.random.default_rng(4)
    options = {"hostile": 2, "window": 100, "iterations": 4}
    strategy = build_strategy(StrategySection(name="flanders", options=options))
    model = draw.normal(size=5)
    tensors, state = as_model(model), strategy.begin(as_model(model))
    merged: list[np.ndarray] = []
    past: Past = {}
    for _ in range(6):
        cohort = draw.choice(list("abcdefgh"), size=6, replace=False)
        deltas = {str(name): draw.normal(size=5) for name in cohort}
        _, model = round_by_hand(deltas, model, merged, past, hostile=2)
        tensors, state = strategy.merge(tensors, form(sent(deltas)), state)
        np.testing.assert_allclose(as_numbers(tensors), model, rtol=1e-6)


def steady(round: int, **others: np.ndarray) -> dict[str, np.ndarray]:
    """Five clients who go on as ever, and others."""
    towards = np.array([1.0, -1.0, 0.5, 0.2, 0.0])
    own = np.random.default_rng(1).normal(size=(5, 5)) * 0.2
    return {f"h{i}": (towards + own[i]) * 0.9**round for i in range(5)} | others


def run_of(rounds: int, options: dict[str, Any], hostile: np.ndarray) -> tuple[np.ndarray, State]:
    strategy = build_strategy(StrategySection(name="flanders", options=options))
    tensors, state = as_model(np.ones(5)), strategy.begin(as_model(np.ones(5)))
    for round in range(rounds):
        many = {f"x{i}": hostile * (1 + 0.1 * i) for i in range(6)}
        tensors, state = strategy.merge(tensors, sent(steady(round, **many)), state)
    return as_numbers(tensors), state


@pytest.mark.parametrize("rule", ["mean", "coordinate-median", "geometric-median"])
def test_most_clients_may_go_where_nothing_led_to(rule: str) -> None:
    """Six of eleven: each is far from its own past in every round, and never in a merge."""
    found, state = run_of(6, {"hostile": 6, "rule": rule}, hostile=np.full(5, -7.0))
    strategy = build_strategy(StrategySection(name="flanders", options={"hostile": 0, "rule": rule}))
    tensors, alone = as_model(np.ones(5)), strategy.begin(as_model(np.ones(5)))
    for round in range(6):
        tensors, alone = strategy.merge(tensors, sent(steady(round)), alone)
    np.testing.assert_allclose(found, as_numbers(tensors))
    assert {name for name in state if name.startswith("local.")} == {f"local.h{i}" for i in range(5)}


def test_the_state_has_the_windows_rounds_and_those_who_were_kept_in_it() -> None:
    strategy = build_strategy(StrategySection(name="flanders", options={"hostile": 1, "window": 2}))
    tensors, state = as_model(np.ones(5)), strategy.begin(as_model(np.ones(5)))
    tensors, state = strategy.merge(tensors, sent(steady(0, once=np.full(5, 0.3))), state)
    assert state["merged"].shape == (1, 5) and "local.once" in state  # type: ignore[union-attr]
    for round in range(1, 3):
        tensors, state = strategy.merge(tensors, sent(steady(round)), state)
    assert "local.once" not in state
    assert all(column.shape == (2, 5) for column in state.values())  # type: ignore[union-attr]


def test_of_large_models_the_seed_draws_what_is_looked_at() -> None:
    options = {"sampled": 2, "hostile": 1}

    def watched(seed: int) -> tuple[float, ...]:
        strategy = build_strategy(StrategySection(name="flanders", options=options), seed=seed)
        model = as_model(np.arange(5.0))
        two = {"a": np.zeros(5), "b": np.zeros(5)}
        _, state = strategy.merge(model, sent(two), strategy.begin(model))
        return tuple(state["merged"][0].tolist())  # type: ignore[union-attr]

    assert all(len(watched(seed)) == 2 for seed in range(3))
    assert watched(1) == watched(1) and len({watched(seed) for seed in range(20)}) > 1


def test_too_few_updates_end_the_run_in_one_line() -> None:
    strategy = build_strategy(StrategySection(name="flanders", options={"hostile": 5}))
    with pytest.raises(
        InconsistentUpdates, match=r"5 updates .* at least 6 \(hostile \+ 1\) against 5 hostile"
    ):
        strategy.merge(as_model(np.ones(5)), sent(steady(0)), {})


def test_most_clients_may_be_hostile_in_a_run(tmp_path: Path) -> None:
    """Five of eight send their deltas backwards, tenfold."""
    attack = {"kind": "sign-flip", "clients": 5, "scale": 10.0}
    data = {"source": "digits", "partition": {"kind": "iid"}}

    def accuracy(strategy: dict[str, Any], name: str) -> float:
        federation = {"clients": 8, "rounds": 12, "quorum": 1.0}
        train = {"lr": 8.0, "batch_size": 16}
        setting = of_pixels(federation, attack=attack, data=data, strategy=strategy, train=train)
        return float(run(setting, tmp_path / name).rounds[-1]["metrics"]["accuracy"])

    kept = accuracy({"name": "flanders", "options": {"hostile": 5}}, "flanders")
    assert kept > 0.8 > 0.5 > accuracy({"name": "geometric-median"}, "median")


@pytest.mark.parametrize(
    ("tables", "pattern"),
    [
        ({"strategy": {"options": {"mixing": True}}}, r"strategy\.options\.mixing: unknown key"),
        ({"strategy": {"options": {"window": 0}}}, r"options\.window: expected greater than or equal"),
        ({"strategy": {"options": {"rule": "krum"}}}, r"options\.rule: expected 'mean', 'coordinate"),
        ({"strategy": {"options": {"hostile": 7}}}, r"needs 8 clients against 7 hostile \(hostile \+ 1"),
        ({"federation": {"cohort": None, "cohort_rate": 0.9}}, r"cohort_rate: draws cohorts of any size"),
        ({"federation": {"selection": "oort"}}, r"selection: 'oort' believes what clients say"),
        ({"tune": {"head_init": "ridge"}}, r"tune\.head_init: adds up whatever clients send"),
    ],
)  # fmt: skip
def test_what_it_cannot_go_with_is_named(tables: dict[str, Any], pattern: str) -> None:
    strategy = {"name": "flanders"} | tables.pop("strategy", {})
    with pytest.raises(ConfigError, match=pattern):
        check_named(of_eight("flanders", **{"strategy": strategy}, **tables))
