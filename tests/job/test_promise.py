"""What `[privacy]` may promise, and the one line that says why it can't."""

import re
from typing import Any

import pytest

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import cohort_is_secret, expected_cohort, local_steps
from atoll.privacy.accounting import Release, epsilon
from atoll.privacy.dp_plan import distributed_terms, dp_plan_of
from atoll.tasks.data_info import check_info_stated

CLIENT = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}
EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.05}


def job(privacy: dict[str, Any], **tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "promise",
        "seed": 1,
        "task": {"name": "image-classification"},
        "data": {"source": "digits"},
        "backbone": {"name": "torchvision:squeezenet1_1"},
        "federation": {"clients": 20, "rounds": 10},
        "privacy": privacy,
    }
    return Job.parse(table | tables, origin="job.toml")


def test_a_promise_of_each_unit_is_resolved_from_the_job_alone() -> None:
    dp_plan = dp_plan_of(job(CLIENT, federation={"clients": 100, "rounds": 7, "cohort_rate": 0.1}), "client")
    assert dp_plan is not None
    assert (dp_plan.where, dp_plan.divisor, dp_plan.event, dp_plan.releases) == (
        "server",
        10.0,
        Release(1.0, 0.1),
        7,
    )
    dp_plan = dp_plan_of(job(EXAMPLE, train={"epochs": 2, "batch_size": 8}), "example")
    assert dp_plan is not None
    # A step takes a twentieth of the examples: two epochs are 40 steps, in each of 10 rounds.
    assert (dp_plan.where, dp_plan.divisor, dp_plan.event, dp_plan.releases) == (
        "client",
        8.0,
        Release(1.0, 0.05),
        400,
    )
    assert dp_plan_of(job({"unit": "none"}), "example") is None


def test_a_distributed_promise_is_charged_once_a_round_and_clients_are_not_amplified() -> None:
    train = {"batch_size": 8}
    dp_plan = dp_plan_of(job(EXAMPLE | DISTRIBUTED, train=train), "example")
    assert dp_plan is not None
    assert (dp_plan.divisor, dp_plan.event, dp_plan.releases) == (8.0 * 20, Release(1.0, 0.05), 10)
    setting = job(CLIENT | DISTRIBUTED, federation={"clients": 20, "cohort": 10, "rounds": 4})
    dp_plan = dp_plan_of(setting, "client")
    assert dp_plan is not None
    assert (dp_plan.divisor, dp_plan.event, dp_plan.releases) == (10.0, Release(1.0, 1.0), 4)


def test_a_cohort_of_fixed_size_amplifies_nothing() -> None:
    dp_plan = dp_plan_of(job(CLIENT, federation={"clients": 100, "rounds": 7, "cohort": 10}), "client")
    assert dp_plan is not None and dp_plan.event.sampling_rate == 1.0


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_noise_is_calibrated_to_the_whole_run(target: float) -> None:
    privacy = {k: v for k, v in CLIENT.items() if k != "noise_multiplier"} | {"epsilon": target}
    setting = job(privacy, federation={"clients": 100, "rounds": 50, "cohort_rate": 0.1})
    dp_plan = dp_plan_of(setting, "client")
    assert dp_plan is not None
    spent = epsilon(dp_plan.planned, dp_plan.delta)
    assert 0.99 * target < spent <= target
    assert dp_plan.within_budget({dp_plan.event: 49}, 1)
    assert not dp_plan.within_budget({dp_plan.event: 50}, 1)
    assert not dp_plan.within_budget({dp_plan.event: 40, Release(0.5, 0.1): 10}, 1)


def test_both_units_have_a_table_each() -> None:
    both = {
        "unit": "both",
        "client": {k: v for k, v in CLIENT.items() if k != "unit"},
        "example": {k: v for k, v in EXAMPLE.items() if k != "unit"},
    }
    setting = job(both)
    assert setting.privacy.units == ("example", "client")
    assert dp_plan_of(setting, "client") is not None and dp_plan_of(setting, "example") is not None


def test_public_numbers() -> None:
    assert expected_cohort(job(CLIENT)) == 20
    assert expected_cohort(job(CLIENT, federation={"clients": 20, "cohort": 5})) == 5
    assert cohort_is_secret(job(CLIENT, federation={"clients": 20, "cohort_rate": 0.5}))
    assert not cohort_is_secret(job(CLIENT))
    assert not cohort_is_secret(job(EXAMPLE, federation={"clients": 20, "cohort_rate": 0.5}))
    assert local_steps(job(EXAMPLE | {"sampling_rate": 0.3})) == 4
    assert local_steps(job(EXAMPLE | {"steps": 3})) == 3


RESAMPLED = {"kind": "resampled", "examples": 9}
DISTRIBUTED = {"where": "distributed"}
COIN = {"federation": {"clients": 20, "cohort_rate": 0.5}}
POOLED = {"evaluate": {"baselines": ["pooled"]}}


@pytest.mark.parametrize(
    ("privacy", "tables", "pattern"),
    [
        ({"unit": "person"}, {}, r"privacy\.unit: expected 'none', 'example', 'client' or 'both'"),
        ({"epsilon": 1.0}, {}, r"privacy: epsilon has no meaning with unit = 'none'"),
        ({"seeded_noise": True}, {}, r"seeded_noise has no meaning with unit = 'none'"),
        (CLIENT | {"delta": 0.05}, {}, r"privacy\.delta: expected less than 1 / federation\.clients = 0\.05"),
        (CLIENT | {"delta": 0.0}, {}, r"privacy\.delta: expected greater than 0, found 0"),  # row 16
        (CLIENT | {"delta": 1.0}, {}, r"privacy\.delta: expected less than 1, found 1"),
        (EXAMPLE | {"delta": 0.004}, {}, r"privacy\.delta: expected less than 1 / the expected examples"),
        (CLIENT | {"noise_multiplier": -1.0}, {}, r"noise_multiplier: expected greater than 0, found -1"),
        (CLIENT | {"noise_multiplier": 0.0}, {}, r"noise_multiplier: expected greater than 0, found 0"),  # 17
        (CLIENT | {"epsilon": 1.0}, {}, r"privacy: expected epsilon .* or noise_multiplier, found both"),
        ({"unit": "client", "delta": 1e-3}, {}, r"or noise_multiplier, found neither"),
        ({"unit": "client", "noise_multiplier": 1.0}, {}, r"privacy\.delta: missing"),
        (CLIENT | {"clipping_norm": 0.0}, {}, r"clipping_norm: expected greater than 0"),  # row 19
        (CLIENT | {"clipping_norm": float("nan")}, {}, r"clipping_norm: expected a finite number"),
        (CLIENT | {"where": "client"}, {}, r"privacy\.where: expected 'server' or 'distributed' for"),
        (CLIENT | {"sampling_rate": 0.1}, {}, r"privacy\.sampling_rate has no meaning for the unit 'client'"),
        (CLIENT | {"quantile": 0.3}, {}, r"privacy\.quantile has no meaning with clipping = 'fixed'"),
        (EXAMPLE | {"sampling_rate": None}, {}, r"privacy\.sampling_rate: missing"),
        (EXAMPLE | {"sampling_rate": 1.5}, {}, r"sampling_rate: expected less than or equal to 1"),
        (EXAMPLE | DISTRIBUTED | {"clipping": "adaptive"}, {}, r"clipping: expected 'fixed' with where"),
        (CLIENT, {"strategy": {"name": "flwr:FedMedian"}}, r"strategy\.name: expected one of fedavg"),  # 20
        (CLIENT, POOLED, r"evaluate\.baselines: pooled would train on the data without noise"),
        ({"unit": "both"}, {}, r"unit = 'both' needs the tables \[privacy\.example\] and"),
        ({"unit": "client", "client": {}}, {}, r"client is for unit = 'both'"),
        (CLIENT | DISTRIBUTED, COIN, r"federation\.cohort_rate: a secure sum needs a cohort of fixed size"),
        (CLIENT | DISTRIBUTED, {"federation": {"clients": 2}}, r"a secure sum needs 3 clients a round"),
        (CLIENT | DISTRIBUTED | {"clipping": "adaptive"}, {}, r"expected 'fixed' where noise is distributed"),
        (EXAMPLE | DISTRIBUTED | {"steps": 2}, {}, r"'distributed' takes one step a round"),
        (EXAMPLE | DISTRIBUTED, {"train": {"optimizer": "adam"}}, r"'distributed' sums gradients"),
        (CLIENT, {"federation": {"secure_aggregation": True}}, r"'server' clips single updates"),
        ({"unit": "none"}, {"federation": {"secure_threshold": 0.9}}, r"without secure_aggregation"),
        (EXAMPLE, {"data": {"source": "digits", "partition": RESAMPLED}}, r"'resampled' lets clients share"),
        (CLIENT | {"epsilon": float("inf")}, {}, r"epsilon: expected a finite number, found inf"),
    ],
)  # fmt: skip
def test_a_promise_that_cannot_be_kept_is_refused_by_key(
    privacy: dict[str, Any], tables: dict[str, Any], pattern: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        job(privacy, **tables)
    assert re.search(pattern, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:  # row 18
    setting = job({"unit": "client", "epsilon": 1e-9, "delta": 1e-12})
    with pytest.raises(ConfigError, match=r"privacy\.epsilon: no noise multiplier below 1e6 reaches epsilon"):
        dp_plan_of(setting, "client")


def test_seeded_noise_may_be_compared_with_what_has_none() -> None:
    assert job(CLIENT | {"seeded_noise": True}, **POOLED).privacy.seeded_noise


def test_classes_must_be_public_where_the_data_is_the_clients_own() -> None:
    from atoll.tasks import task_named

    task = task_named("image-classification")
    setting = job(CLIENT, data={"source": "/data/flowers"})
    with pytest.raises(ConfigError, match=r"data\.classes: missing, expected the list of classes"):
        check_info_stated(setting, task)
    check_info_stated(job(CLIENT, data={"source": "/data/x", "classes": ["a", "b"]}), task)
    check_info_stated(job(CLIENT), task)


def test_what_is_planned_are_the_releases_of_all_rounds_with_their_sampling() -> None:
    dp_plan = dp_plan_of(job(CLIENT, federation={"clients": 100, "rounds": 7, "cohort_rate": 0.1}), "client")
    assert dp_plan is not None and dp_plan.planned == {Release(1.0, 0.1): 7}


def test_the_terms_of_a_secure_sum_are_those_of_the_promise_whose_noise_is_shared() -> None:
    both = {
        "unit": "both",
        "client": {key: CLIENT[key] for key in ("noise_multiplier", "delta")},
        "example": {key: EXAMPLE[key] for key in ("noise_multiplier", "delta", "sampling_rate")},
    }
    for privacy, unit in ((CLIENT | DISTRIBUTED, "client"), (EXAMPLE | DISTRIBUTED, "example")):
        assert distributed_terms(job(privacy)) == dp_plan_of(job(privacy), unit)  # type: ignore[arg-type]
    for privacy in (CLIENT, EXAMPLE, both, {"unit": "none"}):
        assert distributed_terms(job(privacy)) is None


@pytest.mark.parametrize(("deviation", "is_refused"), [(0.34, True), (0.5, True), (0.51, False)])
def test_a_count_that_costs_more_than_it_and_the_sum_may_is_refused_by_its_key(
    deviation: float, is_refused: bool
) -> None:
    setting = job(CLIENT | {"clipping": "adaptive", "count_deviation": deviation})
    if not is_refused:
        assert dp_plan_of(setting, "client") is not None
        return
    with pytest.raises(ConfigError, match=r"^privacy.count_deviation: expected more than 0.5, half of"):
        dp_plan_of(setting, "client")
