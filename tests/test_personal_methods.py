"""Ditto and its kin against their papers' algorithms, written out in NumPy; and what leaves a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.client.state.store import ClientStateStore
from atoll.client.training.batches import batches
from atoll.errors import ConfigError
from atoll.job.job import Job
from tests.test_client_state import Array, Softmax, heads, matrix
from tests.test_personal import stopped_and_resumed
from tests.test_simulation import run

LR = 0.5
FEDAVG = {"name": "fedavg"}


def ditto(pull: float, **tables: Any) -> Job:
    return heads(FEDAVG, personal={"keep": "mixture", "pull": pull, "epochs": 3}, **tables)


def kept(out: Path) -> dict[str, Array]:
    """Each client's own model, as a matrix of weights and bias."""
    memory = ClientStateStore(out / "memory", of_one_run=True)
    states = {f"client-000{n}": memory.load_before("", f"client-000{n}", 99) for n in range(6)}
    return {client: matrix(state, "own/") for client, state in states.items() if state}


def fedavg(problem: Softmax, lines: list[dict[str, Any]]) -> list[Array]:
    """The shared model w before every round, and after the last."""
    shared = [problem.start]
    for line in lines:
        sums, count = np.zeros_like(problem.start), 0
        for k in line["cohort"]:
            w, examples = shared[-1].copy(), len(problem.data[k][1])
            for rows in problem.batches(k, line["round"]):
                w = w - LR * problem.gradient(w, k, rows)
            sums, count = sums + examples * (w - shared[-1]), count + examples
        shared.append(shared[-1] + sums / count)
    return shared


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_ditto_is_algorithm_1_of_its_paper(tmp_path: Path, pull: float) -> None:
    """Li et al. 2021, line by line; with lambda = 0 the same loop is a client's local training alone."""
    setting = ditto(pull)
    result = run(setting, tmp_path)
    problem = Softmax(setting)
    shared = fedavg(problem, result["rounds"])
    own: dict[str, Array] = {}
    for line, w in zip(result["rounds"], shared, strict=False):
        for k in line["cohort"]:
            v = own.get(k, w).copy()
            longer = setting.model_copy(update={"train": setting.train.model_copy(update={"epochs": 3})})
            for rows in batches(len(problem.data[k][1]), longer, line["round"], k):
                held = pull * (v - w) if pull else 0
                v = v - LR * (problem.gradient(v, k, rows) + held)
            own[k] = v
    found = kept(tmp_path)
    assert found.keys() == own.keys() and len(own) > 3
    for k, v in own.items():
        np.testing.assert_allclose(found[k], v, rtol=0, atol=2e-6)


def test_a_great_lambda_holds_own_models_at_the_shared_one(tmp_path: Path) -> None:
    """One step away at most: with eta lambda = 1 a step leads from anywhere to w - eta grad F_k(v)."""
    federation, train = {"cohort": 6, "rounds": 1}, {"lr": 1e-3, "batch_size": 16}
    setting = ditto(1e3, federation=federation, train=train)
    run(setting, tmp_path)
    start = Softmax(setting).start
    for v in kept(tmp_path).values():
        assert 0 < np.abs(v - start).max() < 2e-3  # no entry of such a gradient is over 2


def test_own_models_are_the_same_bits_in_another_engine_and_after_a_stop(tmp_path: Path) -> None:
    setting = ditto(0.7)
    whole, loop = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", engine="loop")
    again = stopped_and_resumed(setting, tmp_path / "c")
    assert whole["final"] == loop["final"] == again["final"]
    for name in ("b", "c"):
        assert all(np.array_equal(v, kept(tmp_path / name)[k]) for k, v in kept(tmp_path / "a").items())


SEEDED = {"noise_multiplier": 0.7, "delta": 1e-3, "clipping_norm": 0.5, "seeded_noise": True}
PROMISES: dict[str, dict[str, Any]] = {
    "client": {"privacy": SEEDED | {"unit": "client"}},
    "client, distributed": {"privacy": SEEDED | {"unit": "client", "where": "distributed"}},
    "example": {"privacy": SEEDED | {"unit": "example", "sampling_rate": 0.25}},
    "example, distributed": {
        "privacy": SEEDED | {"unit": "example", "sampling_rate": 0.25, "where": "distributed"},
        "train": {"lr": LR, "batch_size": 16},
    },
    "secure sum": {"federation": {"secure_aggregation": True}},
}


@pytest.mark.parametrize("promise", PROMISES)
def test_what_leaves_under_a_promise_is_what_leaves_without_own_models(tmp_path: Path, promise: str) -> None:
    """And an own model is the one of a run without a promise: no noise, and as many epochs, of its own."""
    one_round = {"cohort": 3, "rounds": 1}
    tables = {"federation": one_round} | PROMISES[promise]
    tables["federation"] = one_round | tables["federation"]
    own, plain = ditto(0.7, **tables), heads(FEDAVG, **tables)
    result, without = run(own, tmp_path / "own"), run(plain, tmp_path / "plain")
    assert result["model_sha256"] == without["model_sha256"]
    assert result["rounds"][0]["metrics"] == without["rounds"][0]["metrics"]
    if promise != "secure sum":
        assert result["final"]["clients"] == {} and result["personal"]["clients"] == {}
    open_tables = {key: table for key, table in tables.items() if key != "privacy"}
    run(ditto(0.7, **open_tables | {"federation": one_round}), tmp_path / "open")
    found, expected = kept(tmp_path / "own"), kept(tmp_path / "open")
    assert found.keys() == expected.keys() and len(found) == 3
    assert all(np.array_equal(v, expected[client]) for client, v in found.items())


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"personal": {"epochs": 2}}, "epochs has no meaning without keep = 'mixture'"),
        (
            {"personal": {"keep": "mixture"}, "privacy": SEEDED | {"unit": "client", "audit": True}},
            r"privacy\.audit: a run with personal\.keep can't be attacked",
        ),
    ],
)
def test_what_has_no_meaning_or_can_not_be_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        heads(FEDAVG, **tables)
