"""What each client contributed: Shapley's value by all orders, merges in NumPy, axioms, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations
from math import isnan, nan
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.report.contributions import contributions_section
from atoll.report.page import page
from atoll.server.contributions.leave_one_out import Coalition, leave_one_out
from atoll.server.contributions.shapley import exact, orders, sampled, shapley
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.population.population import Population
from tests.client.state.test_client_state import Softmax, heads, matrix
from tests.sim.test_simulation import Breaks, run
from tests.support.small import few_pictures, image_job


def game(players: int, seed: int) -> dict[Coalition, float]:
    rng = np.random.default_rng(seed)
    sets = (c for size in range(players + 1) for c in combinations(range(players), size))
    return {coalition: float(rng.normal()) for coalition in sets}


def by_all_orders(players: int, value: Any, truncation: float = -1.0) -> list[float]:
    """The definition: marginal contributions averaged over every order in which players come."""
    sums, everybody = np.zeros(players), tuple(range(players))
    all_orders = list(permutations(everybody))
    for order in all_orders:
        come: Coalition = ()
        for player in order:
            if come and abs(value(everybody) - value(come)) <= truncation:
                break
            after = tuple(sorted((*come, player)))
            sums[player] += value(after) - value(come)
            come = after
    return list(sums / len(all_orders))


@pytest.mark.parametrize("players", [1, 2, 4, 6])
def test_shapleys_value_is_the_mean_over_all_orders_and_adds_up(players: int) -> None:
    value = game(players, seed=players)
    found = exact(players, value.__getitem__)
    assert found == pytest.approx(by_all_orders(players, value.__getitem__), abs=1e-12)
    assert sum(found) == pytest.approx(value[tuple(range(players))] - value[()], abs=1e-9)


def test_players_who_are_alike_get_the_same_and_one_that_changes_nothing_gets_0() -> None:
    """Player 1 is like 0, and 3 changes nothing."""

    def value(coalition: Coalition) -> float:
        return float((0 in coalition) + (1 in coalition)) ** 1.5 + 2.0 * (2 in coalition and 0 in coalition
            ) + 2.0 * (2 in coalition and 1 in coalition)  # fmt: skip

    found = exact(4, value)
    assert found[0] == pytest.approx(found[1], abs=1e-12) and found[3] == 0.0
    assert sum(found) == pytest.approx(value((0, 1, 2, 3)), abs=1e-9)
    assert leave_one_out(4, value)[3] == 0.0


@pytest.mark.parametrize("truncation", [0.0, 0.3, 0.9])
def test_over_all_orders_the_estimate_is_the_truncated_mean(truncation: float) -> None:
    value = game(4, seed=8)
    found = sampled(4, value.__getitem__, [list(order) for order in permutations(range(4))], truncation)
    assert found == pytest.approx(by_all_orders(4, value.__getitem__, truncation), abs=1e-12)
    if truncation == 0.0:
        assert found == pytest.approx(exact(4, value.__getitem__), abs=1e-12)


def test_where_all_are_worth_what_none_are_nobody_contributes() -> None:
    value = game(3, seed=2) | {(): 0.5, (0, 1, 2): 0.501}
    assert sampled(3, value.__getitem__, [[0, 1, 2]], 0.002) == [0.0, 0.0, 0.0]


def test_each_player_comes_first_equally_often_in_seeded_orders() -> None:
    found = list(orders(4, 10, stream(3, "shapley", 1)))
    assert len(found) == 12 and Counter(order[0] for order in found) == dict.fromkeys(range(4), 3)
    assert all(sorted(order) == [0, 1, 2, 3] for order in found)
    assert (
        found == list(orders(4, 10, stream(3, "shapley", 1))) != list(orders(4, 10, stream(4, "shapley", 1)))
    )


def test_many_orders_come_near_the_exact_value() -> None:
    value = game(7, seed=5)
    few = {"permutations": 10, "truncation": 0.0, "generator": stream(1, "shapley", 1)}
    assert shapley(3, game(3, 1).__getitem__, **few) == exact(3, game(3, 1).__getitem__)  # type: ignore[arg-type]
    drawn = list(orders(7, 7000, stream(1, "shapley", 1)))
    found = sampled(7, value.__getitem__, drawn, 0.0)
    # One marginal contribution of such a game has deviation sqrt(2).
    assert found == pytest.approx(exact(7, value.__getitem__), abs=5 * 2**0.5 / 7000**0.5)
    assert sum(found) == pytest.approx(value[tuple(range(7))] - value[()], abs=1e-9)


def test_an_undefined_value_is_not_taken_for_0() -> None:
    value = game(2, seed=1) | {(0,): nan}
    assert [isnan(v) for v in leave_one_out(2, value.__getitem__)] == [False, True]
    assert all(isnan(v) for v in exact(2, value.__getitem__))
    assert all(isnan(v) for v in sampled(2, value.__getitem__, [[0, 1]], 0.1))


class Listening(Breaks):
    """Keeps every update; `client-0001` sends what `client-0000` does."""

    left = 99
    heard: ClassVar[dict[int, list[Update]]] = {}

    def send_and_receive(self, request: Any, names: Any, timeout: float) -> Any:
        first = None
        for reply in super().send_and_receive(request, names, timeout):
            if isinstance(reply, Update):
                if reply.client == "client-0000":
                    first = reply
                if reply.client == "client-0001" and first is not None:
                    reply = replace(first, client="client-0001")
                self.heard.setdefault(reply.round, []).append(reply)
            yield reply


def of_four(method: str | None, **tables: Any) -> Job:
    evaluate = {} if method is None else {"contributions": method}
    evaluate |= tables.pop("evaluate", {})
    federation = {"clients": 5, "cohort": 4, "rounds": 3} | tables.pop("federation", {})
    return heads({"name": "fedavg", **tables.pop("strategy", {})}, federation=federation, evaluate=evaluate,
                 **tables)  # fmt: skip


@pytest.mark.parametrize("method", ["leave-one-out", "shapley"])
def test_a_runs_contributions_are_those_of_merges_in_numpy(tmp_path: Path, method: str) -> None:
    """FedAvg of every coalition's updates, weighted by examples, and its accuracy on the test set."""
    setting = of_four(method, strategy={"lr": 0.9})
    population = Population.of(setting)
    Listening.heard.clear()
    result = run_job(setting, Listening.of(population), tmp_path / "r", cached_test_set(population, None))
    problem = Softmax(setting)
    test = cached_test_set(population, None)(problem.learner)
    assert test is not None
    x, y = problem._table(test)
    w, totals = problem.start, Counter[str]()
    for line in result.rounds:
        updates = sorted(Listening.heard[line["round"]], key=lambda u: u.client)
        deltas, counts = [matrix(u.delta) for u in updates], [u.num_examples for u in updates]

        def model(coalition: Coalition, w: Any = w, deltas: Any = deltas, counts: Any = counts) -> Any:
            total = sum(counts[i] for i in coalition)
            return w + 0.9 * sum(counts[i] / total * deltas[i] for i in coalition) if coalition else w

        def value(coalition: Coalition, model: Any = model) -> float:
            return float(np.mean((x @ model(coalition).T).argmax(1) == y))

        everybody = tuple(range(len(updates)))
        wanted = by_all_orders(len(updates), value) if method == "shapley" else [
            value(everybody) - value(tuple(j for j in everybody if j != i)) for i in everybody]  # fmt: skip
        expected = dict(zip((u.client for u in updates), wanted, strict=True))
        assert line["contributions"] == pytest.approx(expected, abs=1e-6)  # metrics are in float32
        if method == "shapley":
            sum_of_all = sum(line["contributions"].values())
            assert sum_of_all == pytest.approx(value(everybody) - value(()), abs=1e-6)
        if {"client-0000", "client-0001"} <= line["contributions"].keys():
            both = line["contributions"]
            assert both["client-0000"] == pytest.approx(both["client-0001"], abs=1e-9)
        totals.update(line["contributions"])
        w = model(everybody)
    found = result.contributions["clients"]
    assert {name: found[name]["value"] for name in totals} == pytest.approx(dict(totals))
    assert max(abs(v) for v in totals.values()) > 0.01


def test_all_contributions_of_a_run_add_up_to_what_it_learnt(tmp_path: Path) -> None:
    setting = of_four("shapley", evaluate={"baselines": ["zero_shot"]})
    result = run(setting, tmp_path / "r")
    learnt = result.final["server"]["accuracy"] - result.baselines["zero_shot"]["accuracy"]
    values = [one["value"] for one in result.contributions["clients"].values()]
    assert sum(v for v in values if v is not None) == pytest.approx(learnt, abs=1e-9) and learnt > 0.2


@pytest.mark.parametrize("strategy", ["fedadam", "fednova"])
def test_measuring_changes_no_bit_and_a_resumed_run_tells_the_same(tmp_path: Path, strategy: str) -> None:
    section = {"strategy": {"name": strategy}}
    setting = of_four("shapley", **section, evaluate={"permutations": 3, "truncation": 0.0})
    usual = run(of_four(None, **section), tmp_path / "usual")
    whole = run(setting, tmp_path / "whole")
    assert whole.model_sha256 == usual.model_sha256 and usual.contributions is None
    assert run(setting, tmp_path / "loop", engine="loop").contributions == whole.contributions
    population = Population.of(setting)
    with pytest.raises(KeyboardInterrupt):
        run_job(setting, Breaks.of(population), tmp_path / "r", cached_test_set(population, None))
    resumed = run(setting, tmp_path / "r", resume=True)
    assert resumed.contributions == whole.contributions
    assert resumed.model_sha256 == whole.model_sha256


def test_whole_networks_contribute_and_keep_their_bits(tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "data": few_pictures(24, classes=2), "tune": {"method": "full"},
        "train": {"lr": 0.01, "batch_size": 4}, "federation": {"clients": 2, "rounds": 2, "quorum": 1.0},
    }  # fmt: skip
    asked = run(
        image_job("squeezenet1_1", evaluate={"contributions": "leave-one-out"}, **tables), tmp_path / "a"
    )
    assert asked.model_sha256 == run(image_job("squeezenet1_1", **tables), tmp_path / "b").model_sha256
    assert set(asked.contributions["clients"]) == {"client-0000", "client-0001"}


def test_who_never_took_part_is_undefined_in_the_result_and_on_the_page(tmp_path: Path) -> None:
    result = run(of_four("leave-one-out", federation={"cohort": 2, "rounds": 1}), tmp_path / "r", report=True)
    clients = result.contributions["clients"]
    absent = [name for name in clients if name not in result.rounds[0]["cohort"]]
    assert len(absent) == 3
    assert all(clients[name] == {"value": None, "rounds": 0, "undefined": 0} for name in absent)
    text = (tmp_path / "r" / "report.html").read_text()
    assert text.count("undefined: never took part") == 3 and "What each client contributed" in text
    found = result.contributions
    found["clients"]["client-0000"] = {"value": 0.5, "rounds": 3, "undefined": 1}
    found["clients"]["client-0001"] = {"value": None, "rounds": 1, "undefined": 1}
    section = contributions_section(found | {"lower_is_better": True})
    assert section is not None and section.shown[0] == ("client-0000", "3", "+0.5000 (undefined in 1 round)")
    assert ("client-0001", "1", "undefined") in section.shown and "counts negatively" in section.reading
    many = {f"c{i:03d}": {"value": float(-i), "rounds": 1, "undefined": 0} for i in range(200)}
    section = contributions_section(found | {"clients": many})
    assert section is not None and section.left_out == "80 clients between"
    assert (section.shown[0][0], section.shown[-1][0], section.last[-1][0]) == ("c000", "c099", "c199")
    assert "Contributions" not in page(tmp_path, replace(result, contributions=None))


CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"privacy": CLIENT}, r"evaluate\.contributions: .* a release without noise"),
        ({"federation": {"secure_aggregation": True}}, "a secure sum hides single updates"),
        ({"strategy": {"name": "krum"}}, "krum is for a whole cohort; expected one of fedavg"),
        ({"personal": {"keep": "head"}, "tune": {"method": "full"}}, "the server has no whole model"),
        ({"tune": {"head_init": "ridge"}}, "a head in closed form is made of sums"),
        (
            {"evaluate": {"permutations": 3}},
            "permutations has no meaning with contributions = 'leave-one-out', only with 'shapley'",
        ),
        (
            {"evaluate": {"truncation": 0.1}},
            "truncation has no meaning with contributions = 'leave-one-out', only with 'shapley'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        of_four("leave-one-out", **tables)


def test_noised_updates_of_examples_under_a_promise_may_be_compared(tmp_path: Path) -> None:
    privacy = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4, "sampling_rate": 0.25,
               "seeded_noise": True}  # fmt: skip
    data = {"source": "digits", "classes": [str(digit) for digit in range(10)]}
    result = run(of_four("leave-one-out", privacy=privacy, data=data), tmp_path / "r")
    assert len(result.rounds[0]["contributions"]) == 4


def test_a_server_without_a_test_set_is_told_what_is_missing(tmp_path: Path) -> None:
    setting = of_four("shapley")
    population = Population.of(setting)
    with pytest.raises(ConfigError, match=r"evaluate\.contributions: the server measures them on a test set"):
        run_job(setting, Breaks.of(population), tmp_path / "r", lambda learner: None)
