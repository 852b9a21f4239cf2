"""What is tuned changes on the way: from the best model, in the same bits everywhere and after any kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.tensors import tensors_sha256
from atoll.report.run_result import RunResult
from atoll.server.events import Event, RoundEnded, ignore_events
from atoll.server.run.run_job import validate_job
from atoll.sim.audit.replay import job_to_replay
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.trained import trained
from tests.sim.test_simulation import job
from tests.support.small import few_pictures

GROWING: dict[str, Any] = {
    "method": "head",
    "then": [
        {"method": "last-k", "layers": 1, "after": 2},
        {"method": "full", "after": 1, "lr": 0.001},
    ],
}
SMALL: dict[str, Any] = {"clients": 3, "cohort": 2, "rounds": 4}


def scheduled(tune: dict[str, Any] = GROWING, **tables: Any) -> Job:
    tables = {"federation": SMALL, "train": {"lr": 0.02}} | tables
    return job(**tables | {"tune": tune, "data": few_pictures(45) | tables.get("data", {})})


def run(job: Job, out: Path, **options: Any) -> RunResult:
    return simulate(job, out, on_event=ignore_events, report=False, **options)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    where = tmp_path_factory.mktemp("grown") / "run"
    return run(scheduled(), where), where


@pytest.mark.slow
@pytest.mark.processes
def test_stages_follow_each_other_and_engines_agree(grown: tuple[RunResult, Path], tmp_path: Path) -> None:
    whole, _ = grown
    assert [line["tuning"] for line in whole.rounds] == [
        "head", "head", "last-k with layers = 1", "full",
    ]  # fmt: skip
    sent = [line["bytes_up"] for line in whole.rounds]
    assert sent[1] - sent[0] < sent[2] - sent[1] < sent[3] - sent[2]
    for name, options in (("loop", {"engine": "loop"}), ("pool", {"workers": 2})):
        other = run(scheduled(), tmp_path / name, **options)
        assert other.model_sha256 == whole.model_sha256, name


@pytest.mark.slow
def test_the_first_stage_is_the_job_without_a_schedule(grown: tuple[RunResult, Path], tmp_path: Path) -> None:
    plain = run(scheduled({"method": "head"}), tmp_path / "plain")
    for ours, theirs in zip(grown[0].rounds[:2], plain.rounds, strict=False):
        assert ours["model_sha256"] == theirs["model_sha256"]


@pytest.mark.slow
def test_the_model_of_the_last_stage_is_used_like_any_other(grown: tuple[RunResult, Path]) -> None:
    result, where = grown
    learner, tensors = trained(where)
    assert learner.job.tune.method == "full" and not learner.job.tune.then
    assert tensors_sha256(tensors) == result.model_sha256
    test = Population.of(scheduled()).test_shard(learner)
    assert test is not None
    found = learner.compute(learner.evaluate(tensors, test))
    assert found["accuracy"] == pytest.approx(result.final["server"]["accuracy"])


def test_a_stage_begins_with_what_was_learnt_before(tmp_path: Path) -> None:
    tune = {"method": "head", "then": [{"method": "lora", "rank": 2, "after": 3, "lr": 1e-30}]}
    lines = run(scheduled(tune), tmp_path / "run").rounds
    assert lines[3]["tuning"] == "lora"
    assert lines[3]["metrics"]["loss"] == pytest.approx(lines[2]["metrics"]["loss"], rel=1e-5)
    assert len({line["model_sha256"] for line in lines[:3]}) == 3


@pytest.mark.slow
def test_a_stall_ends_a_stage_and_the_next_one_starts_from_the_best_model(tmp_path: Path) -> None:
    tune = {"method": "head", "then": [{"method": "lora", "rank": 2, "patience": 2, "lr": 1e-30}]}
    tables = {
        "train": {"lr": 2.0},  # too fast: what is measured falls now and then
        "data": {"validation_fraction": 0.3},
        "federation": SMALL | {"rounds": 14},
    }
    result = run(scheduled(tune, **tables), tmp_path / "run")
    lines = result.rounds
    first = [line for line in lines if line["tuning"] == "head"]
    assert len(first) < len(lines)
    measured = [line["validation"]["accuracy"] for line in first]
    best = max(range(len(measured)), key=measured.__getitem__)
    assert len(measured) == best + 3
    after = lines[len(first)]["metrics"]["loss"]
    assert after == pytest.approx(lines[best]["metrics"]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_run_killed_in_any_stage_goes_on_to_the_same_bits(
    grown: tuple[RunResult, Path], tmp_path: Path, last: int
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.line["round"] == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(scheduled(), tmp_path / "cut", on_event=stop, report=False)
    assert run(scheduled(), tmp_path / "cut", resume=True).model_sha256 == grown[0].model_sha256


PRIVATE = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"tune": {"then": [{"method": "full"}]}}, r"expected after .rounds. or patience .*found neither"),
        (
            {"tune": {"method": "lora", "then": [{"method": "full", "after": 2}]}},
            r"tune\.then: full would leave behind what lora tuned",
        ),
        (
            {"tune": {"method": "last-k", "layers": 2, "then": [{"method": "last-k", "after": 2}]}},
            r"last-k with layers = 1 would leave behind what last-k with layers = 2 tuned",
        ),
        ({"privacy": PRIVATE}, r"tune\.then: what is tuned can't change on the way with privacy\.unit"),
        ({"federation": SMALL | {"compression": "int8"}}, r"on the way with federation\.compression"),
        (
            {"tune": {"then": [{"method": "full", "patience": 2}]}, "data": {"validation_fraction": 0.0}},
            r"tune\.then: clients keep nothing back to see progress stall by",
        ),
        ({"tune": {"then": [{"method": "lora", "after": 1, "targets": ["x"], "rnk": 2}]}}, r"rnk"),
    ],
    ids=["no-time", "lora-lost", "layers-lost", "privacy", "feedback", "no-validation", "unknown"],
)
def test_a_schedule_that_cannot_be_kept_is_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scheduled(**{"tune": GROWING} | tables)


def test_a_later_stage_is_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"engine cohort has one way to train"):
        simulate(scheduled(), Path("nowhere"), engine="cohort", on_event=ignore_events, report=False)
    asked = scheduled(backbone={"name": "nowhere"})
    with pytest.raises(Exception, match="nowhere"):
        validate_job(asked)


def test_an_audit_that_would_play_the_first_stage_alone_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"tune\.then: a run with it can't be attacked; .* \['last-k', 'full'\]"
    ):
        job_to_replay(scheduled())
