"""What a job's promise comes to: its noise, what a round and a run cost, and when the target is reached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from atoll.privacy.accounting import Release, epsilon
from atoll.privacy.banded import squared_sensitivity
from atoll.privacy.dp_plan import DpPlan, dp_plan_of, planned_sensitivity
from tests.support.small import image_job

CLIENT = {"unit": "client", "noise_multiplier": 1.5, "delta": 1e-5, "clipping_norm": 1.0}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.5, "delta": 1e-5}
TURNS = {"clients": 12, "cohort": 3, "rounds": 8}


def plan(privacy: dict[str, Any], **tables: Any) -> DpPlan:
    unit = privacy["unit"]
    found = dp_plan_of(image_job("raw:pixels", privacy=privacy, **tables), unit)
    assert found is not None
    return found


@pytest.mark.parametrize(("cohort", "expected"), [(100, 5.0), (30, 1.5), (31, 1.55)])
def test_the_noise_on_counts_is_a_twentieth_of_the_cohort_and_the_noise_on_sums_at_least(
    cohort: int, expected: float
) -> None:
    federation = {"clients": 200, "rounds": 2, "cohort": cohort}
    found = plan(CLIENT | {"clipping": "adaptive"}, federation=federation)
    assert found.count_deviation == pytest.approx(expected)
    given = plan(CLIENT | {"clipping": "adaptive", "count_deviation": 7.0}, federation=federation)
    assert given.count_deviation == 7.0
    assert plan(CLIENT, federation=federation).count_deviation is None


def test_without_a_rate_every_example_is_in_every_step() -> None:
    closed = {"method": "head", "head_init": "ridge", "feature_norm": 5.0}  # one release of all examples
    assert plan(EXAMPLE, tune=closed, federation={"clients": 4, "rounds": 1}).event == Release(1.5, 1.0)
    assert plan(EXAMPLE | {"sampling_rate": 0.25}).event == Release(1.5, 0.25)


def test_the_cost_of_a_whole_run_is_that_of_its_rounds_or_of_one_release_of_the_matrix() -> None:
    alone = plan(CLIENT, federation=TURNS)
    assert (alone.bands, alone.planned) == (1, {Release(1.5, 1.0): 8})
    assert alone.cost_of_round({1: 1}, 2) == Release(1.5, 1.0)
    banded = plan(CLIENT | {"mechanism": "banded", "bands": 2}, federation=TURNS)
    sensitivity = squared_sensitivity(dict.fromkeys(range(1, 9), 1), 2) ** 0.5
    assert planned_sensitivity(8, 2) == pytest.approx(sensitivity)
    [(release, times)] = banded.planned.items()
    assert times == 1 and release.sampling_rate == 1.0
    assert release.noise_multiplier == pytest.approx(1.5 / sensitivity)
    # The rounds one after the other cost together what the run does, and the first less than all.
    charged: dict[int, int] = {}
    costs = []
    for round in range(1, 9):
        costs.append(banded.cost_of_round(charged, round))
        charged[round] = 1
    together = sum(cost.noise_multiplier**-2 for cost in costs)
    assert together == pytest.approx(release.noise_multiplier**-2)


@pytest.mark.parametrize("bands", [1, 2, 3])
def test_a_run_may_make_the_rounds_that_its_noise_was_calibrated_for_and_no_more(bands: int) -> None:
    own = {"mechanism": "banded", "bands": bands} if bands > 1 else {}
    promise = {"unit": "client", "epsilon": 4.0, "delta": 1e-5, "clipping_norm": 1.0} | own
    found = plan(promise, federation=TURNS)
    assert epsilon(dict(found.planned), 1e-5) == pytest.approx(4.0, rel=1e-3)
    spent: dict[Release, int] = {}
    charged: dict[int, int] = {}
    for round in range(1, 9):
        cost = found.cost_of_round(charged, round)
        assert found.within_budget(spent, 1, cost), round
        spent[cost] = spent.get(cost, 0) + 1
        charged[round] = charged.get(round, 0) + 1
    assert not found.within_budget(spent, 1, found.cost_of_round(charged, 8))
    assert not found.within_budget(spent, 3, found.cost_of_round(charged, 8))


def test_what_was_not_planned_is_weighed_against_the_target() -> None:
    found = plan({"unit": "client", "epsilon": 4.0, "delta": 1e-5, "clipping_norm": 1.0}, federation=TURNS)
    quiet, loud = Release(100 * found.noise_multiplier, 1.0), Release(found.noise_multiplier / 4, 1.0)
    assert found.within_budget({quiet: 1}, 7)
    assert not found.within_budget({loud: 1}, 1)
    assert plan(CLIENT, federation=TURNS).within_budget({loud: 1000}, 1)  # without a target, anything


def test_the_planned_rounds_are_within_the_target_whatever_the_accountants_last_digit() -> None:
    """The calibration stops a little under the target; a target a little under it would refuse the last."""
    found = plan({"unit": "client", "epsilon": 4.0, "delta": 1e-5, "clipping_norm": 1.0}, federation=TURNS)
    reached = epsilon(dict(found.planned), 1e-5)
    stricter = replace(found, promise=found.promise.model_copy(update={"epsilon": reached * (1 - 1e-9)}))
    assert stricter.within_budget({found.event: 7}, 1)
    assert not stricter.within_budget({found.event: 8}, 1)


def test_sampled_rounds_cost_as_sampled_and_others_are_not_taken_for_them() -> None:
    federation = {"clients": 40, "rounds": 8, "cohort": None, "cohort_rate": 0.25}
    found = plan(
        {"unit": "client", "epsilon": 4.0, "delta": 1e-5, "clipping_norm": 1.0}, federation=federation
    )
    assert found.event.sampling_rate == 0.25
    assert found.cost_of_round({1: 1}, 2) == found.event
    assert found.within_budget({found.event: 3}, 1)
    # As many with the same noise but everybody in them are another matter.
    assert not found.within_budget({Release(found.noise_multiplier, 1.0): 3}, 1)
