"""How a round's clients are chosen: each rule against its paper, what it refuses, and resuming."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.errors import ConfigError
from atoll.job.federation import OortSection
from atoll.job.job import Job
from atoll.job.train import TrainSection
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.protocol.stacked_updates import stacked
from atoll.report.text import how_chosen
from atoll.server.roster import ClientRoster
from atoll.server.rounds.validation import MAX_LOSS, Validation
from atoll.server.run.checkpoint import latest
from atoll.server.run.run_job import run_job
from atoll.server.selection.by_size import BySize
from atoll.server.selection.oort import (
    LAST,
    TOTAL,
    UTILITY,
    Explored,
    Oort,
    exploited,
    exploring,
    loses_utility,
    utilities,
)  # fmt: skip
from atoll.server.selection.power_of_choice import LOSS, PowerOfChoice, largest
from atoll.server.selection.proportional import in_steps, uniforms_of, with_replacement, without_replacement
from atoll.server.selection.rules import selection_rule
from atoll.sim.audit.replay import job_to_replay
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.population.population import Population
from atoll.strategies.mean import weighted_mean
from tests.sim.test_simulation import Breaks, run
from tests.strategies.test_strategy_runs import of_pixels

SIZES = np.array([1, 0, 2, 3])
RULES = ("by-size", "power-of-choice", "oort")


def chance_of_order(sizes: list[int], order: tuple[int, ...]) -> Fraction:
    """That places are drawn in this order, each in proportion to size from those that are left."""
    chance, left = Fraction(1), sum(sizes)
    for place in order:
        chance *= Fraction(sizes[place], left) if left else 0
        left -= sizes[place]
    return chance


def test_draws_without_replacement_have_exactly_the_chances_of_successive_draws() -> None:
    """Every uniform number of a grid of 60, on which all totals that can be left divide."""
    grid = [(i + 0.5) / 60 for i in range(60)]
    found = Counter(tuple(without_replacement(SIZES, pair)) for pair in product(grid, grid))
    wanted = {order: chance_of_order(SIZES.tolist(), order) for order in permutations(range(4), 2)}
    assert {o: Fraction(n, 3600) for o, n in found.items()} == {o: c for o, c in wanted.items() if c}
    assert sorted(without_replacement(SIZES, [0.99] * 4)) == [0, 2, 3]  # no size is left for a fourth


def test_draws_with_replacement_have_exactly_the_chances_of_sizes() -> None:
    found = Counter(with_replacement(SIZES, [(i + 0.5) / 60 for i in range(60)]))
    assert found == {0: 10, 2: 20, 3: 30}
    assert with_replacement(np.array([0, 0]), [0.5]) == [] == without_replacement(np.array([0]), [0.5])


@pytest.mark.parametrize("seed", range(3))
def test_draws_of_many_are_those_of_a_loop_over_what_is_left(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, uniforms = rng.integers(0, 50, 30), rng.random(20).tolist()
    left, expected = {i: int(n) for i, n in enumerate(sizes)}, []
    for u in uniforms:
        target = int(u * sum(left.values()))
        ends = np.cumsum([left[place] for place in sorted(left)])
        place = sorted(left)[int((ends <= target).sum())]
        expected.append(place)
        del left[place]
    assert without_replacement(sizes, uniforms) == expected


def update(client: str, examples: int, loss: float, value: float = 0.0, count: float = 1.0) -> Update:
    told = {"train_loss.sum": loss * count, "train_loss.count": count}
    states = {name: torch.tensor(number, dtype=torch.float64) for name, number in told.items()}
    return Update(client, 1, {"w": torch.tensor([value], dtype=torch.float64)}, examples, states)


NAMES = ("a", "b", "c", "d")


def test_the_merge_by_size_is_the_mean_by_examples_on_average() -> None:
    """Scheme I's lemma: the even mean over draws is unbiased. By all draws of two, each with its chance."""
    values = dict(zip(NAMES, (5.0, 7.0, -1.0, 2.0), strict=True))
    chances = SIZES / SIZES.sum()
    expected = sum(
        chances[i] * chances[j] * (values[NAMES[i]] + values[NAMES[j]]) / 2
        for i, j in product(range(4), repeat=2)
    )
    assert expected == pytest.approx(np.average(list(values.values()), weights=SIZES))
    rule, seen = BySize(NAMES, SIZES, 2, seed=3), []
    for round in range(1, 2001):
        updates = [update(name, 99, 1.0, values[name]) for name in rule.cohort({}, round)]
        for some in (updates, stacked(updates)):
            weighed, _ = rule(some, round, {}, {})
            merged = float(weighted_mean(weighed)["w"])
        drawn = with_replacement(SIZES, uniforms_of(3, "by-size", round, 2))
        assert merged == pytest.approx(np.mean([values[NAMES[place]] for place in drawn]))
        seen.append(merged)
    assert np.mean(seen) == pytest.approx(expected, abs=4 * np.std(seen) / 2000**0.5)


def test_power_of_choice_is_its_papers_three_lines() -> None:
    rng = np.random.default_rng(4)
    names = tuple(f"c{i:02d}" for i in range(12))
    sizes = rng.integers(1, 40, 12)
    rule = PowerOfChoice(names, sizes, 5, 2, seed=9, weights_are_chosen=False)
    known = {LOSS + name: float(loss) for name, loss in zip(names[:9], rng.random(9), strict=True)}
    for round in range(1, 40):
        drawn = without_replacement(sizes, uniforms_of(9, "power-of-choice", round, 5))
        losses = {place: known.get(LOSS + names[place], math.inf) for place in drawn}
        best = max(
            (pair for pair in permutations(drawn, 2) if drawn.index(pair[0]) < drawn.index(pair[1])),
            key=lambda pair: (
                sorted((losses[p] for p in pair), reverse=True),
                [-drawn.index(p) for p in pair],
            ),
        )
        assert rule.cohort(known, round) == sorted(names[place] for place in best)
    assert largest([4, 2], [0.1, 0.1], 1) == [4]
    after = rule.after_round({LOSS + "x": 1.0}, [update("c00", 5, 0.25, count=4.0)], 1)
    assert after == {LOSS + "x": 1.0, LOSS + "c00": 0.25}
    [even] = rule.update_transforms
    weighed, _ = even([update("a", 9, 1.0, 2.0), update("b", 1, 1.0, 4.0)], 1, {}, {})
    assert float(weighted_mean(weighed)["w"]) == 3.0
    assert replace(rule, weights_are_chosen=True).update_transforms == ()


KNOWN = Explored(
    np.array([0, 3, 4, 7]), np.array([10.0, 0.0, 4.0, 1000.0]), np.array([1.0, 5.0, 2.0, 4.0]),
    np.array([2.0, 1.0, 8.0, 3.0]),
)  # fmt: skip


def test_oorts_utility_is_its_papers_formula() -> None:
    options = OortSection(clip=2 / 3, penalty=2.0)  # of four: the third smallest, 10
    for i, found in enumerate(utilities(KNOWN, options, 6, preferred=4.0)):
        u, last, t = KNOWN.utilities[i], KNOWN.last_rounds[i], KNOWN.seconds[i]
        expected = min(u, 10.0) / 10.0 + math.sqrt(0.1 * math.log(6) / last)
        if t > 4.0:
            expected *= (4.0 / t) ** 2
        assert found == pytest.approx(expected, rel=1e-12)


def test_oort_draws_only_those_near_the_best_in_proportion_to_utility() -> None:
    util = np.array([0.5, 0.99, 1.0, 0.96])
    # The second largest is 0.99; 0.95 times that is 0.9405, which leaves out the first alone.
    grid = [(i + 0.5) / 40 for i in range(40)]
    found = Counter(tuple(exploited(KNOWN, util, 2, 0.95, pair)) for pair in product(grid, grid))
    steps = [0, *in_steps(util[1:]).tolist()]
    for order in permutations(range(4), 2):
        expected = float(chance_of_order(steps, order))
        places = tuple(int(KNOWN.places[i]) for i in order)
        assert found[places] / 1600 == pytest.approx(expected, abs=2 / 40)
    assert exploited(KNOWN, util, 9, 0.95, [0.1] * 4) and exploited(KNOWN, np.zeros(0), 3, 0.95, []) == []


def test_oort_explores_by_speed_less_and_less() -> None:
    options = OortSection(explore=0.8, explore_decay=0.5, explore_least=0.1)
    assert [exploring(options, r) for r in (1, 2, 3, 4, 9)] == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.1])
    names = tuple(f"c{i}" for i in range(6))
    speeds = {"c0": 8.0, "c1": 1.0, "c2": 1.0, "c3": 2.0, "c4": 4.0, "c5": 1.0}
    rule = Oort(
        names, np.array([5, 5, 5, 5, 0, 5]), 1, TrainSection(), 2, OortSection(speeds=speeds, explore=1.0)
    )
    first = Counter(rule.cohort({}, round)[0] for round in range(1, 3001))
    total = 8 + 1 + 1 + 2 + 1  # c4 has no example
    for name in names:
        share = 0 if name == "c4" else speeds[name] / total
        spread = math.sqrt(share * (1 - share) / 3000)
        assert first[name] / 3000 == pytest.approx(share, abs=4 * spread)


def test_virtual_seconds_are_examples_times_epochs_over_a_speed_of_the_jobs_seed() -> None:
    sizes = np.array([10, 20, 40])
    rule = Oort(
        ("a", "b", "c"),
        sizes,
        1,
        TrainSection(epochs=3),
        11,
        OortSection(speed_spread=5.0, speeds={"b": 2.0}),
    )
    speeds = 1 + 4 * torch.rand(3, generator=stream(11, "speed"), dtype=torch.float64).numpy()
    speeds[1] = 2.0
    np.testing.assert_array_equal(rule.seconds, sizes * 3 / speeds)
    assert rule.preferred_seconds({}) == np.median(rule.seconds)
    assert rule.preferred_seconds({"relaxed": 2.0}) == 2 * np.median(rule.seconds)
    given = replace(rule, options=OortSection(seconds=8.0, seconds_step=0.25))
    assert given.preferred_seconds({"relaxed": 1.0}) == 10.0


def test_the_pacer_relaxes_when_a_window_brings_less_than_the_one_before() -> None:
    totals = {1: 5.0, 2: 5.0, 3: 4.0, 4: 4.0}
    assert [loses_utility(totals, round, 2) for round in (1, 2, 3, 4)] == [False, False, False, True]
    rule = Oort(NAMES, np.ones(4, dtype=np.int64), 1, TrainSection(), 1, OortSection(window=2))
    state: Any = {}
    for round, loss in enumerate((5.0, 5.0, 4.0, 4.0, 4.5, 4.5), start=1):
        state = rule.after_round(state, [update("a", 2, loss)], round)
    assert state == {
        UTILITY + "a": 9.0, LAST + "a": 6.0, "relaxed": 1.0, **{TOTAL + str(r): t for r, t in zip(
            (3, 4, 5, 6), (8.0, 8.0, 9.0, 9.0), strict=True)},
    }  # fmt: skip
    assert rule.after_round({}, [update("a", 2, -3.0)], 1)[UTILITY + "a"] == 0.0
    assert rule.after_round({}, [], 1) == {TOTAL + "1": 0.0}


def test_who_has_left_is_not_chosen_and_nobody_twice() -> None:
    rule = Oort(NAMES, np.array([3, 1, 4, 1]), 3, TrainSection(), 5, OortSection(explore=0.4))
    state = {UTILITY + n: 1.0 for n in ("a", "c", "gone")} | {LAST + n: 1.0 for n in ("a", "c", "gone")}
    for round in range(2, 60):
        cohort = rule.cohort(state, round)
        assert len(set(cohort)) == 3 and set(cohort) <= set(NAMES) and cohort == sorted(cohort)


def chosen_by(rule: str, **tables: Any) -> Job:
    federation = {"clients": 8, "cohort": 3, "quorum": 0.3, "rounds": 5, "selection": rule}
    data = {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.3}}
    if rule == "oort":
        federation["oort"] = {"window": 1, "explore": 0.5}
    return of_pixels(federation | tables.pop("federation", {}), **({"data": data} | tables))


@pytest.mark.parametrize("rule", RULES)
def test_every_engine_and_a_resumed_run_choose_the_same_clients(tmp_path: Path, rule: str) -> None:
    setting = chosen_by(rule)
    whole = run(setting, tmp_path / "whole")
    cohorts = [line["cohort"] for line in whole.rounds]
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    loop = run(setting, tmp_path / "loop", engine="loop")
    population, out = Population.of(setting), tmp_path / "r"
    stopped = Breaks.of(population)
    stopped.left = 3
    with pytest.raises(KeyboardInterrupt):
        run_job(setting, stopped, out, cached_test_set(population, None))
    resumed = run(setting, out, resume=True)
    for other in (loop, resumed):
        assert [line["cohort"] for line in other.rounds] == cohorts
        assert other.model_sha256 == whole.model_sha256
    states = [latest(folder / "checkpoints", setting.hash) for folder in (tmp_path / "whole", out)]
    assert states[0] is not None and states[1] is not None
    numbers = [
        {k: v for k, v in found.state.items() if k.startswith("selection.")} for found in states if found
    ]
    assert numbers[0] == numbers[1] and bool(numbers[0]) == (rule != "by-size")


def test_a_run_by_power_of_choice_takes_the_candidates_with_the_largest_losses(tmp_path: Path) -> None:
    """From the losses that updates brought, kept here beside the run."""
    setting = chosen_by("power-of-choice", federation={"candidates": 6})
    population = Population.of(setting)
    sizes, told = population.roster(setting).sizes, {}
    heard: dict[int, dict[str, float]] = {}

    class Listening(Breaks):
        left = 99

        def send_and_receive(self, request: Any, names: Any, timeout: float) -> Any:
            for reply in super().send_and_receive(request, names, timeout):
                if isinstance(reply, Update):
                    mean = float(reply.states["train_loss.sum"] / reply.states["train_loss.count"])
                    heard.setdefault(reply.round, {})[reply.client] = mean
                yield reply

    result = run_job(setting, Listening.of(population), tmp_path / "r", cached_test_set(population, None))
    names = population.names(setting)
    for line in result.rounds:
        drawn = without_replacement(sizes, uniforms_of(setting.seed, "power-of-choice", line["round"], 6))
        ranked = sorted(drawn, key=lambda p: -told.get(names[p], math.inf))
        assert line["cohort"] == sorted(names[p] for p in ranked[:3])
        told |= heard[line["round"]]


@pytest.mark.parametrize(
    ("loss", "count", "said"),
    [
        (1.0, 0.0, "train_loss.count: expected more than 0, found 0"),
        (1.0, -2.0, "expected more than 0, found -2"),
        (10 * MAX_LOSS, 1.0, "the mean training loss is 1e+31, expected at most 1e+30"),
    ],
)
def test_a_loss_that_nobody_can_be_chosen_by_sets_its_update_aside(
    loss: float, count: float, said: str
) -> None:
    model = {"w": torch.zeros(1, dtype=torch.float64)}
    updates = [update("a", 3, 0.5), update("b", 3, loss, count=count)]
    if count == 0.0:
        updates[1].states["train_loss.sum"] = torch.tensor(1.0, dtype=torch.float64)
    validate = Validation.of(chosen_by("oort"))
    for replies in (updates, stacked(updates)):
        found = validate(replies, ["a", "b"], model, 1)
        assert [u.client for u in found.updates] == ["a"] and said in found.set_aside["b"]
        usual = Validation.of(of_pixels({"clients": 2}))(replies, ["a", "b"], model, 1)
        assert len(usual.updates) == 2
    assert validate([], ["a"], model, 1).num_valid == 0


CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-4, "sampling_rate": 0.25}
KRUM = {"strategy": {"name": "krum"}, "federation": {"cohort": 8, "quorum": 1.0}}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"privacy": CLIENT}, "a client's promise counts on chances that depend on no data"),
        ({"privacy": EXAMPLE}, "which no noise protects; expected 'uniform' with privacy.unit = 'example'"),
        ({"federation": {"secure_aggregation": True}}, "which a secure sum hides"),
        ({"federation": {"cohort": None}}, "chooses a number of clients; expected cohort, found none"),
        ({"federation": {"cohort": None, "cohort_rate": 0.5}}, "expected cohort, found cohort_rate = 0.5"),
        ({"strategy": {"name": "qffl"}}, r"federation\.selection: .*qffl"),
    ],
    ids=["client", "example", "secure", "all", "poisson", "fair"],
)
def test_what_cannot_be_is_refused_by_name(rule: str, tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        chosen_by(rule, **tables)
    assert "\n" not in str(refused.value) and "selection" in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "federation", "tables", "said"),
    [
        ("by-size", {"weights": "equal"}, {}, r"federation\.weights: with federation\.selection = 'by-size'"),
        ("by-size", {}, {"tune": {"head_init": "ridge"}}, r"tune\.head_init: with federation\.selection"),
        ("by-size", {}, {"strategy": {"name": "scaffold"}}, "scaffold has a rule of its own"),
        ("by-size", {"devices": "d.csv", "over_sampling": 1.5}, {}, "over_sampling: the first to answer"),
        (
            "by-size",
            {"candidates": 5},
            {},
            "candidates has no meaning with selection = 'by-size', only with 'power-of-choice'",
        ),
        (
            "power-of-choice",
            {"oort": {}},
            {},
            "oort has no meaning with selection = 'power-of-choice', only with 'oort'",
        ),
        ("power-of-choice", {"candidates": 2}, {}, "candidates: expected at least the 3 that a round asks"),
        ("power-of-choice", {"candidates": 9}, {}, "at most clients = 8, found 9"),
        ("oort", {"concurrency": 5}, {"strategy": {"name": "fedbuff"}}, "clients start one by one"),
        ("oort", {"oort": {"explore": 0.1}}, {}, "explore_least: expected at most explore = 0.1, found 0.2"),
        ("oort", {"oort": {"explor": 0.1}}, {}, r"federation\.oort\.explor: unknown key, did you mean"),
        ("sizes", {}, {}, r"federation\.selection: expected 'uniform', 'by-size'"),
    ],
    ids=str,
)
def test_keys_that_make_no_sense_are_refused(
    rule: str, federation: dict[str, Any], tables: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        chosen_by(rule, federation=federation, **tables)


@pytest.mark.parametrize("rule", ["power-of-choice", "oort"])
def test_rules_against_hostile_clients_take_no_cohort_that_they_talk_themselves_into(rule: str) -> None:
    from atoll.strategies import check_merging

    with pytest.raises(ConfigError, match=r"hostile ones would always be chosen; expected 'uniform' with"):
        check_merging(chosen_by(rule, **KRUM))


def test_sizes_that_nobody_tells_and_speeds_of_nobody_are_named() -> None:
    silent = ClientRoster(NAMES, np.zeros(4, dtype=np.int64), [])
    with pytest.raises(ConfigError, match=r"federation\.selection: 'by-size' needs how many examples"):
        selection_rule(chosen_by("by-size"), silent)
    setting = chosen_by("oort", federation={"oort": {"speeds": {"a": 2.0, "nobody": 1.0}}})
    with pytest.raises(ConfigError, match=r"federation\.oort\.speeds: there is no client 'nobody'"):
        selection_rule(setting, ClientRoster(NAMES, np.ones(4, dtype=np.int64), []))


def test_an_attack_on_the_run_names_the_rule() -> None:
    with pytest.raises(ConfigError, match=r"federation\.selection: a run with it can't be attacked"):
        job_to_replay(chosen_by("oort"))


def test_the_report_says_how_clients_were_chosen() -> None:
    assert [bool(how_chosen(chosen_by(rule))) for rule in (*RULES, "uniform")] == [True, True, True, False]
    assert how_chosen(None) == ""
