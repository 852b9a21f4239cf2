"""FLTrust against its formulas as a loop, and the client that it trusts in whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import ConfigError, InconsistentUpdates
from atoll.job.job import Job
from atoll.protocol.messages import Update
from atoll.protocol.requests import Request
from atoll.protocol.stacked_updates import stacked
from atoll.server.roster import ClientRoster
from atoll.server.rounds.cohort import sample
from atoll.server.rounds.validation import Validation
from atoll.server.run.run_job import run_job
from atoll.sim.attacks.hostile_clients import hostile_names
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.population.population import Population, client_names
from atoll.strategies import check_merging
from atoll.strategies.robust.fltrust import FlTrust, trusted_mean
from tests.strategies.test_strategy_runs import of_pixels, run

ROOT = "client-0003"


def trusting(federation: dict[str, Any] | None = None, **tables: Any) -> Job:
    strategy = {"name": "fltrust", "options": {"root": ROOT}}
    return of_pixels({"clients": 8, "rounds": 2} | (federation or {}), **{"strategy": strategy} | tables)


def by_hand(rows: np.ndarray, root: np.ndarray) -> np.ndarray:
    """The paper's equations 2 to 4, client by client."""
    scores, scaled = [], []
    for row in rows:
        size = np.sqrt((row**2).sum())
        if size == 0:
            continue
        cosine = (row * root).sum() / size / max(np.sqrt((root**2).sum()), 1e-300)
        scores.append(max(cosine, 0.0))
        scaled.append(np.sqrt((root**2).sum()) / size * row)
    if sum(scores) == 0:
        return np.zeros_like(root)
    return np.asarray(sum(s * x for s, x in zip(scores, scaled, strict=True)) / sum(scores))


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 12))
def test_the_mean_is_the_papers(seed: int, clients: int, numbers: int) -> None:
    draw = np.random.default_rng(seed)
    rows, root = draw.normal(size=(clients, numbers)), draw.normal(size=numbers)
    rows[draw.random(clients) < 0.2] = 0
    found = trusted_mean(torch.from_numpy(rows), torch.from_numpy(root)).numpy()
    np.testing.assert_allclose(found, by_hand(rows, root), rtol=1e-9, atol=1e-12)
    assert np.linalg.norm(found) <= np.linalg.norm(root) * (1 + 1e-9)


def test_whom_nobody_agrees_with_and_who_does_not_move_leave_the_model_as_it_is() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    for root in ([-1.0, -1.0], [0.0, 0.0]):
        assert trusted_mean(rows, torch.tensor(root, dtype=torch.float64)).tolist() == [0.0, 0.0]


def update(client: str, *values: float) -> Update:
    states = {"train_loss.sum": torch.tensor(1.0, dtype=torch.float64)}
    states["train_loss.count"] = torch.tensor(1.0, dtype=torch.float64)
    return Update(client, 1, {"w": torch.tensor(values)}, 3, states)


@pytest.mark.parametrize("form", [list, stacked])
def test_the_trusted_update_is_compared_with_and_not_merged(form: Any) -> None:
    model, updates = {"w": torch.zeros(2)}, [update("a", 6.0, 8.0), update("north", 0.0, 2.0)]
    merged, _ = FlTrust("north", lr=0.5).merge(model, form([*updates, update("z", 0.0, -4.0)]), {})
    torch.testing.assert_close(merged["w"], torch.tensor([0.6, 0.8]))  # half of (6, 8) at a length of 2
    with pytest.raises(InconsistentUpdates, match="no update of south, which the others are compared with"):
        FlTrust("south").merge(model, form(updates), {})


def test_the_trusted_client_is_asked_in_every_round_as_one_of_the_cohort() -> None:
    names = client_names(8)
    drawn = [sample(names, trusting({"cohort": 3}), round) for round in range(1, 60)]
    assert all(len(cohort) == 3 and ROOT in cohort and cohort == sorted(cohort) for cohort in drawn)
    assert {name for cohort in drawn for name in cohort} == set(names)
    by_coin = [sample(names, trusting({"cohort_rate": 0.2}), round) for round in range(1, 60)]
    assert all(ROOT in cohort for cohort in by_coin)
    assert sum(map(len, by_coin)) / 59 == pytest.approx(1 + 7 * 0.2, abs=0.6)


def test_it_is_never_hostile() -> None:
    for seed in range(30):
        attack = {"kind": "sign-flip", "clients": 7}
        hostile = hostile_names(trusting(attack=attack, seed=seed), client_names(8))
        assert len(hostile) == 7 and ROOT not in hostile


def test_without_its_update_a_round_has_none() -> None:
    validate = Validation.of(trusting())
    names = [ROOT, "client-0001"]
    model = {"w": torch.zeros(1)}
    for form in (list, stacked):
        whole = validate(form([update(name, 1.0) for name in sorted(names)]), names, model, 1)
        assert whole.num_valid == 2 and not whole.set_aside
        alone = validate(form([update("client-0001", 1.0)]), names, model, 1)
        assert alone.num_valid == 0 and set(alone.set_aside) == set(names)
        assert f"no usable update of {ROOT}" in alone.set_aside["client-0001"]


class Silent(InlineTransport):
    """A transport on which the trusted client doesn't answer for a number of rounds' attempts."""

    times = 1

    def send_and_receive(self, request: Request, names: Sequence[str], timeout: float) -> Iterable[Any]:
        replies = super().send_and_receive(request, names, timeout)
        if type(request).__name__ != "TrainRequest" or self.times < 1:
            yield from replies
            return
        self.times -= 1
        yield from (reply for reply in list(replies) if reply.client != ROOT)


def test_a_round_is_tried_again_until_the_trusted_client_answers(tmp_path: Path) -> None:
    setting = trusting()
    population = Population.of(setting)
    again = run_job(setting, Silent.of(population), tmp_path / "a", cached_test_set(population, None))
    assert again.model_sha256 == run(setting, tmp_path / "b").model_sha256
    lost = Silent.of(population)
    lost.times = 99
    with pytest.raises(InconsistentUpdates, match=rf"0 of 8 usable.*no usable update of {ROOT}"):
        run_job(setting, lost, tmp_path / "c", cached_test_set(population, None))


def test_most_clients_may_be_hostile(tmp_path: Path) -> None:
    """Five of eight send their deltas backwards, tenfold."""
    attack = {"kind": "sign-flip", "clients": 5, "scale": 10.0}
    data = {"source": "digits", "partition": {"kind": "iid"}}

    def accuracy(strategy: dict[str, Any], name: str) -> float:
        train = {"lr": 8.0, "batch_size": 16}
        setting = trusting({"rounds": 12}, attack=attack, data=data, strategy=strategy, train=train)
        return float(run(setting, tmp_path / name).rounds[-1]["metrics"]["accuracy"])

    trusted = accuracy({"name": "fltrust", "options": {"root": ROOT}}, "trust")
    assert trusted > 0.8 > 0.5 > accuracy({"name": "geometric-median"}, "median")


@pytest.mark.parametrize(
    ("tables", "pattern"),
    [
        ({"strategy": {"name": "fltrust"}}, r"strategy\.options\.root: .*(missing|required|expected)"),
        ({"tune": {"head_init": "ridge"}}, r"tune\.head_init: adds up whatever clients send"),
        ({"federation": {"cohort": 1}}, r"federation\.cohort: with fltrust .* at least 2, found 1"),
        ({"federation": {"cohort": 3, "selection": "oort"}}, r"selection: fltrust asks the trusted"),
        ({"federation": {"weights": "equal"}}, r"federation\.weights: fltrust has a rule of its own"),
    ],
)  # fmt: skip
def test_what_it_cannot_go_with_is_named(tables: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        check_merging(trusting(tables.pop("federation", None), **tables))


def test_a_trusted_client_that_is_not_there_is_named() -> None:
    setting = Job.parse(
        json.loads(trusting().model_dump_json())
        | {"strategy": {"name": "fltrust", "options": {"root": "nroth"}}},
        origin="test",
    )
    roster = ClientRoster(("north", "south"), np.array([3, 3]), [])
    with pytest.raises(ConfigError, match=r"options\.root: there is no client 'nroth', did you mean 'north'"):
        roster.check(setting)
    gone = ClientRoster(("north", "south"), np.array([3, 3]), [], {"nroth": "its policy forbids it"})
    with pytest.raises(ConfigError, match="nroth does not take part: its policy forbids it"):
        gone.check(setting)
