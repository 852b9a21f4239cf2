"""Searches for settings: what may vary, what is tried, what it is judged by, and what a kill leaves."""

from __future__ import annotations

import csv
import json
import math
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import tomli_w

from atoll.cli.main import run as command_line
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.features import Features
from atoll.learning.learner import Learner
from atoll.server.events import RoundEnded, RunResumed, ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.sim.search.distributions import Choice, Range
from atoll.sim.search.space import Space, checked_job, default_space, has_meaning, job_of
from atoll.sim.search.study import PLACE, STARTUP, Outcome, Search, SearchFolder, TrialResult
from atoll.sim.search.trials import Pruner, Stopped, judged, play_trial, validation_metrics, without_test_set
from atoll.sim.sweep.grid import Base
from atoll.tasks import task_named
from tests.support.processes import atoll

ROOT = Path(__file__).parents[3]
TABLE: dict[str, Any] = {
    "name": "tuned",
    "seed": 3,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "validation_fraction": 0.2},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "train": {"batch_size": 32, "lr": 0.001},
    "federation": {"clients": 4, "rounds": 4},
}
VALUES: dict[str, Any] = {
    "tune.rank": 4, "tune.layers": 1, "train.lr_step": 1, "strategy.lr_step": 1, "backbone.compile": True,
    "federation.order": "arrival",
}  # fmt: skip
"""What tests give to keys that 0.5 is no value of."""
GRID = ["train.lr=0.001,0.03,1.0", "train.epochs=1,4", "strategy.name=fedavg,fedadam"]


def base_of(**tables: Any) -> Base:
    table = {**TABLE, **{name: TABLE.get(name, {}) | given for name, given in tables.items()}}
    return Base(table, "tuned.toml", Path())


def job_file(folder: Path, **tables: Any) -> Path:
    path = folder / "tuned.toml"
    path.write_text(tomli_w.dumps(base_of(**tables).table))
    return path


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


# What may vary


def test_ranges_say_ends_scale_and_whether_they_are_of_whole_numbers() -> None:
    assert Range.of("train.lr=0.001..1,log") == Range("train.lr", 0.001, 1, True, False)
    assert Range.of("tune.rank = 2 .. 16") == Range("tune.rank", 2, 16, False, True)
    small = Range.of("train.lr=1e-3..0.01,log")
    assert small.text(0.00123456) == "0.00123" and small.text(0.0009999) == "0.001"
    assert small.ends == ("0.001", "0.01") and small.param("0.02") is None and small.param("x") is None
    assert Choice("train.lr", ("0.10", "1")).param("0.1") == "0.10"


@pytest.mark.parametrize(
    ("key", "table", "has"),
    [
        ("tune.rank", {"tune": {"method": "lora"}}, True),
        ("tune.rank", {"tune": {"method": "last-k"}}, False),
        ("tune.layers", {"tune": {"method": "last-k"}}, True),
        ("train.momentum", {}, True),
        ("train.momentum", {"train": {"optimizer": "adam"}}, False),
        ("strategy.tau", {}, False),
        ("strategy.tau", {"strategy": {"name": "fedyogi"}}, True),
        ("federation.compression_top_k", {"federation": {"compression": "int8"}}, False),
        ("tune.layers", {"tune": {"method": "lora"}}, True),  # adapters in the last layers
        ("tune.layers", {"tune": {"method": "full"}}, False),
        ("train.lr_step", {"train": {"lr_schedule": "step"}}, True),
        ("train.lr_step", {"train": {"lr_schedule": "cosine"}}, False),
        ("strategy.lr_step", {"strategy": {"name": "fedadam", "lr_schedule": "step"}}, True),
        ("strategy.lr_step", {"strategy": {"name": "fedadam"}}, False),
        ("backbone.compile", {"tune": {"method": "full"}}, False),
        ("federation.order", {}, False),
        ("train.lr", {}, True),
    ],
)
def test_a_key_that_says_nothing_beside_the_others_is_left_out(
    key: str, table: dict[str, Any], has: bool
) -> None:
    assert has_meaning(key, table) == has
    value = VALUES.get(key, 0.5)
    section, _, name = key.partition(".")
    given = base_of(**{**table, section: {**table.get(section, {}), name: value}})
    if has:
        checked_job(given, {})
    else:  # a job that says it is refused by the same rule
        with pytest.raises(ConfigError, match=name):
            checked_job(given, {})


def test_what_needs_what_needs_another_goes_with_the_first() -> None:
    base = base_of(strategy={"name": "fedadam", "lr_schedule": "step", "lr_step": 1, "lr_decay": 0.5})
    assert job_of(base, {"strategy.lr_schedule": "cosine"}).strategy.lr_step is None
    assert job_of(base, {"strategy.name": "fedavg"}).strategy.lr_schedule is None
    space = Space.of(
        ["strategy.lr_step=1,2", "strategy.lr_schedule=step,cosine", "strategy.name=feddyn,fedadam"], []
    )
    assert [one.key for one in space.keys] == ["strategy.name", "strategy.lr_schedule", "strategy.lr_step"]
    found = [dict(texts) for texts in space.combinations(base_of())]
    name, schedule, step = (one.key for one in space.keys)
    assert found == [
        {name: "feddyn"},
        {name: "fedadam", schedule: "step", step: "1"},
        {name: "fedadam", schedule: "step", step: "2"},
        {name: "fedadam", schedule: "cosine"},
    ]


def test_what_the_job_says_of_its_own_strategy_is_not_said_of_another() -> None:
    base = base_of(strategy={"name": "fedadam", "lr": 0.03, "tau": 0.01})
    assert job_of(base, {"strategy.name": "fedavg"}).strategy.lr is None
    assert job_of(base, {"strategy.name": "fedyogi"}).strategy.tau is None
    assert job_of(base, {"strategy.name": "fedadam"}).strategy.lr == 0.03
    assert job_of(base, {"strategy.name": "fedavg", "strategy.lr": "0.5"}).strategy.lr == 0.5
    base = base_of(tune={"method": "lora", "rank": 4}, train={"momentum": 0.9})
    assert job_of(base, {"tune.method": "head", "train.optimizer": "adam"}).tune.rank is None


def test_a_finite_space_has_each_combination_once_without_what_has_no_meaning() -> None:
    space = Space.of(["tune.rank=2,4", "tune.method=head,lora"], [])
    found = [dict(texts) for texts in space.combinations(base_of())]
    assert found == [
        {"tune.method": "head"},
        {"tune.method": "lora", "tune.rank": "2"},
        {"tune.method": "lora", "tune.rank": "4"},
    ]
    assert list(Space.of([], ["train.lr=0.1..1"]).combinations(base_of())) == []


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"train": {"optimizer": "adam"}},
        {"tune": {"method": "lora"}, "backbone": {"name": "torchvision:vit_b_16", "weights": "random"}},
        {
            "tune": {"method": "last-k"},
            "backbone": {"name": "torchvision:squeezenet1_1", "weights": "random"},
        },
        {"strategy": {"name": "flwr:FedMedian"}},
    ],
    ids=["head", "adam", "lora", "last-k", "flower"],
)
def test_the_default_space_is_one_that_can_be_searched(tables: dict[str, Any]) -> None:
    base = base_of(**tables)
    space = default_space(job_of(base, {}))
    space.check(base)
    keys = {one.key for one in space.keys}
    assert {"train.lr", "train.epochs", "train.batch_size"} <= keys
    assert ("tune.rank" in keys) == (base.table.get("tune", {}).get("method") == "lora")


def test_values_are_apart_by_their_places_and_words_by_being_different() -> None:
    space = Space.of(
        ["train.epochs=8,1,2", "strategy.name=fedavg,fedadam", "tune.rank=2,4"], ["train.lr=0.01..1,log"]
    )
    one = {"train.epochs": "1", "strategy.name": "fedavg", "train.lr": "0.01"}
    assert space.distance(one, one) == 0
    # epochs 1 and 2 are neighbours of three, 1/2; the rate is one of two decades away, 1/2; a rank, 1
    other = {"train.epochs": "2", "strategy.name": "fedadam", "train.lr": "0.1", "tune.rank": "2"}
    assert space.distance(one, other) == pytest.approx(0.5 + 1 + 0.5 + 1)


# What is tried


def value_of(texts: dict[str, str]) -> float:
    """A made-up accuracy that is best at a rate of 0.1 and four epochs."""
    return 0.9 - 0.1 * math.log10(float(texts["train.lr"]) / 0.1) ** 2 - 0.05 * (texts["train.epochs"] == "1")


def searched(folder: Path, count: int, *, reopened: bool = False, at_once: int = 2) -> list[TrialResult]:
    """A search whose trials end in the order in which they began, `at_once` under way; no run is played."""
    space, base = Space.of(["train.epochs=1,4"], ["train.lr=0.0001..10,log"]), base_of()

    def opened() -> Search:
        return SearchFolder(folder).opened(base, space, seed=1, seeds=1, at_once=at_once)

    folder.mkdir(exist_ok=True)
    search, tried = opened(), list[TrialResult]()
    while len(tried) < count or any(one.outcome is None for one in tried):
        if reopened:
            search = opened()
            tried = search.trials()
        if len(tried) < count and search.may_begin(len(tried), tried):
            new = search.next(tried)
            assert new is not None
            tried.append(new)
            continue
        oldest = next(one for one in tried if one.outcome is None)
        value = value_of(dict(oldest.texts))
        tried[oldest.index] = search.end(oldest, Outcome(value, {"accuracy": value}, {1: value}))
    return tried


def test_a_search_that_is_opened_anew_after_every_step_tries_the_same(tmp_path: Path) -> None:
    first = searched(tmp_path / "a", 7)
    again = searched(tmp_path / "b", 7, reopened=True)
    assert [one.texts for one in again] == [one.texts for one in first]
    assert len({one.job.hash for one in first}) == 7


def test_a_search_starts_with_the_job_as_it_is_and_comes_near_the_best(tmp_path: Path) -> None:
    tried = searched(tmp_path / "search", 16)
    search = SearchFolder(tmp_path / "search").opened(
        base_of(), Space.of(["train.epochs=1,4"], ["train.lr=0.0001..10,log"]), seed=1, seeds=1, at_once=9
    )
    assert search.at_once == 2  # as it began
    assert tried[0].texts == {"train.epochs": "1", "train.lr": "0.001"}
    best = search.ranked(tried)[0]
    assert best.texts["train.epochs"] == "4" and 0.03 < float(best.texts["train.lr"]) < 0.3
    # In the rate's five decades the value falls by up to 0.9; one epoch costs 0.05.
    shares = search.importances(tried)
    assert sum(shares.values()) == pytest.approx(1) and shares["train.lr"] > shares["train.epochs"]


def test_the_first_trials_are_far_from_each_other(tmp_path: Path) -> None:
    """Drawn independently, five trials would miss one of three rates in a third of all searches."""
    for seed in range(4):
        space, base = Space.of(GRID, []), base_of()
        search = Search(tmp_path / "none", base, space, seed, 1, 1, space.settings_of(base))
        search.__dict__["study"] = optuna.create_study(direction="maximize")
        tried: list[TrialResult] = []
        for _ in range(STARTUP):
            new = search.next(tried)
            assert new is not None
            tried.append(search.end(new, Outcome(value=0.5, metrics={"accuracy": 0.5})))
        assert {one.texts["train.lr"] for one in tried} >= {"0.001", "1.0"}
        assert {one.texts["strategy.name"] for one in tried} == {"fedavg", "fedadam"}


def test_a_finite_space_is_tried_to_its_end_and_no_setting_twice(tmp_path: Path) -> None:
    space, base = (
        Space.of(["train.lr=0.1,1.0", "train.batch_size=16,30", "train.accumulate=1,4"], []),
        base_of(),
    )
    search = SearchFolder(tmp_path).opened(base, space, seed=1, seeds=1, at_once=1)
    tried: list[TrialResult] = []
    while (new := search.next(tried)) is not None:
        tried.append(search.end(new, Outcome(value=0.5, metrics={"accuracy": 0.5})))
    # Without autograd parts of a batch have no meaning; and 4 is no divisor of 30 anyway.
    assert sorted(tuple(one.texts.values()) for one in tried) == [
        ("0.1", "16", "1"), ("0.1", "30", "1"), ("1.0", "16", "1"), ("1.0", "30", "1"),
    ]  # fmt: skip


def test_a_kill_between_the_two_notes_of_an_end_loses_nothing(tmp_path: Path) -> None:
    from optuna.trial import Trial, TrialState

    space = Space.of(GRID, [])
    search = SearchFolder(tmp_path).opened(base_of(), space, seed=1, seeds=1, at_once=1)
    one = search.next([])
    assert one is not None
    frozen = search.study.trials[one.number]
    Trial(search.study, frozen._trial_id).set_user_attr("outcome", json.dumps(vars(Outcome(value=0.25))))
    again = SearchFolder(tmp_path).opened(base_of(), space, seed=1, seeds=1, at_once=1)
    [known] = again.trials()
    assert known.outcome == Outcome(value=0.25)
    assert again.study.trials[0].state == TrialState.COMPLETE and again.study.trials[0].value == 0.25


def test_of_equal_trials_the_one_with_the_smaller_loss_is_better_and_none_without_a_value(
    tmp_path: Path,
) -> None:
    space = Space.of(GRID, [])
    search = SearchFolder(tmp_path).opened(base_of(), space, seed=1, seeds=1, at_once=1)
    tried: list[TrialResult] = []
    for outcome in (
        Outcome(0.5, {"accuracy": 0.5, "loss": 0.3}),
        Outcome(0.5, {"accuracy": 0.5, "loss": 0.2}),
        Outcome(refused="it diverged"),
        Outcome(failed="out of memory"),
    ):
        new = search.next(tried)
        assert new is not None
        tried.append(search.end(new, outcome))
    assert [one.index for one in search.ranked(tried)] == [1, 0]
    assert [trial.user_attrs[PLACE] for trial in search.study.trials] == [0, 1, 2, 3]


# What it is judged by


def judge(tmp_path: Path, curves: list[dict[int, float]], rounds: int = 8) -> Pruner:
    job = job_of(base_of(federation={"rounds": rounds}), {})
    return Pruner.of(job, tmp_path, "accuracy", curves)


def heard(judge: Pruner, values: list[float]) -> int | None:
    """The round after which the judge stops a run with these values."""
    try:
        for round, value in enumerate(values, start=1):
            judge.on_event(RoundEnded({"round": round, "metrics": {"accuracy": value}}))
    except Stopped as stopped:
        return stopped.round
    return None


def test_a_trial_is_stopped_where_its_best_is_below_the_median_of_five_others(tmp_path: Path) -> None:
    curves = [{r: level * r / 8 for r in range(1, 9)} for level in (0.2, 0.4, 0.6, 0.8, 1.0)]
    # The median after r rounds is 0.6 r / 8: 0.15, 0.225, 0.3 after 2, 3, 4. No trial is stopped in the
    # first quarter, 2 of 8 rounds.
    assert heard(judge(tmp_path, curves), [0.0, 0.0, 0.2, 0.9]) == 3
    assert heard(judge(tmp_path, curves), [0.0, 0.16, 0.23, 0.29]) == 4
    assert heard(judge(tmp_path, curves), [0.5] * 5 + [0.0] * 2) == 7  # the best, 0.5, is below 0.525
    assert heard(judge(tmp_path, curves[:4]), [0.0] * 8) is None
    # What is left after the last round would save nothing.
    assert heard(judge(tmp_path, curves), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0]) is None


def test_a_run_that_goes_on_is_judged_by_its_earlier_rounds_too(tmp_path: Path) -> None:
    curves = [dict.fromkeys(range(1, 9), 0.5)] * 5
    lines = [{"round": round, "metrics": {"accuracy": 0.1}} for round in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Stopped) as stopped:
        judge(tmp_path, curves).on_event(RunResumed(3))
    assert stopped.value.round == 3


def test_a_value_is_the_mean_over_seeds_and_what_is_undefined_is_refused() -> None:
    found = judged([{"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.75, "loss": None}], "accuracy")
    assert found == Outcome(value=0.625, metrics={"accuracy": 0.625})
    assert judged([{"accuracy": None}], "accuracy").refused == "its accuracy is undefined"
    assert judged([{}], "accuracy").refused == "no client keeps anything back to measure on"


def work_of(out: Path, job: Job, **given: Any) -> str:
    work = {"jobs": [job.canonical], "outs": [str(out)], "metric": "accuracy", "curves": []}
    return json.dumps(work | given)


def test_no_trial_looks_at_the_test_set_and_its_bits_are_those_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(base_of(evaluate={"baselines": ["zero_shot", "pooled"]}), {"train.lr": "1.0"})
    test = Population.of(job).test
    held_out = set(task_named(job.task.name).keys(test))
    assert len(held_out) > 300
    seen: set[bytes] = set()
    for owner, name in ((Features, "plain"), (Features, "for_training"), (Learner, "evaluate")):
        original = getattr(owner, name)

        def spied(self: Any, *given: Any, original: Any = original, **more: Any) -> Any:
            seen.update(*(one.keys for one in given if hasattr(one, "keys") and not isinstance(one, dict)))
            return original(self, *given, **more)

        monkeypatch.setattr(owner, name, spied)
    outcome = Outcome.from_json(play_trial(work_of(tmp_path / "trial", job)))
    assert outcome.refused is None and outcome.failed is None and outcome.value is not None
    assert seen and not seen & held_out
    tried = json.loads((tmp_path / "trial" / "result.json").read_text())
    assert tried["final"]["server"] == {} and tried["baselines"] == {}

    plain = simulate(job, tmp_path / "plain", on_event=ignore_events, report=False)
    assert seen >= held_out  # so that the spy is no blind one
    assert plain.model_sha256 == tried["model_sha256"]
    clients = [c for c in plain.final["clients"].values() if c["examples"]]
    mean = sum(c["accuracy"] * c["examples"] for c in clients) / sum(c["examples"] for c in clients)
    assert outcome.value == pytest.approx(mean, abs=1e-6)
    assert outcome.curve[4] == outcome.value and sorted(outcome.curve) == [1, 2, 3, 4]


def test_more_seeds_train_on_the_same_clients_and_keep_other_examples_back(tmp_path: Path) -> None:
    first = job_of(base_of(), {"train.lr": "1.0"})
    second = Job.parse(first.model_dump(mode="json") | {"seed": 4}, origin="test")
    both = {"jobs": [first.canonical, second.canonical], "outs": [str(tmp_path / "a"), str(tmp_path / "b")]}
    outcome = Outcome.from_json(play_trial(work_of(tmp_path, first, **both)))
    clients = Population.of(first)
    alone = [
        validation_metrics(job, tmp_path / f"{job.seed}", without_test_set(job, clients), ignore_events)[
            "accuracy"
        ]
        for job in (first, second)
    ]
    assert outcome.value == pytest.approx(sum(alone) / 2) and alone[0] != alone[1]


def test_settings_that_cannot_be_trained_are_refused_and_stop_nothing(tmp_path: Path) -> None:
    job = job_of(base_of(), {"train.lr": "1e30"})
    outcome = Outcome.from_json(play_trial(work_of(tmp_path / "run", job)))
    assert outcome.value is None and outcome.failed is None
    assert outcome.refused and "\n" not in outcome.refused


# The command


@pytest.mark.parametrize(
    ("arguments", "tables", "pattern"),
    [
        (["--vary", "train.lr"], {}, "--vary train.lr: expected key=value,value"),
        (["--range", "train.lr"], {}, "--range train.lr: expected key=low..high"),
        (["--range", "train.lr=0.1"], {}, "expected key=low..high"),
        (["--range", "train.lr=0.1..x"], {}, "expected key=low..high"),
        (["--range", "train.lr=0.1..1,ln"], {}, "expected key=low..high"),
        (["--range", "train.lr=1..0.1"], {}, "expected low < high"),
        (["--range", "train.lr=0..1,log"], {}, "low > 0 with log"),
        (["--range", "train.lr=0..1"], {}, "train.lr"),
        (["--range", "train.lr=0.1..1", "--vary", "train.lr=1,2"], {}, "train.lr: found twice"),
        (["--range", "train.lr=0.1..1", "--set", "train.lr=2"], {}, "train.lr: in --set and in --vary"),
        (["--vary", "train.rate=1,2"], {}, "rate"),
        (["--vary", "train.lr=0.1,-1"], {}, "train.lr"),
        (["--vary", "strategy.name=fedavg,fedevg"], {}, "fedevg"),
        (["--vary", "tune.rank=2,4"], {}, "tune.rank: has no meaning in any trial, expected another tune"),
        (["--vary", "backbone.name=raw:pixels,hf:no/such", "--set", "backbone.offline=true"], {}, "no/such"),
        (["--vary", "seed=1,2"], {}, "--vary seed: expected --seeds"),
        (["--vary", "federation.clients=2,4"], {}, "federation.clients: may not vary"),
        (["--vary", "data.validation_fraction=0.1,0.2"], {}, "data.validation_fraction: may not vary"),
        (["--vary", "privacy.epsilon=1,2"], {}, "privacy.epsilon: may not vary"),
        (["--trials", "0"], {}, "'--trials': 0 is not in the range"),
        ([], {"data": {"validation_fraction": 0.0}}, "data.validation_fraction: clients keep nothing back"),
        ([], {"evaluate": {"every": 5}}, "evaluate.every: no round of 4 is measured"),
        (
            [],
            {"privacy": {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}},
            "privacy.unit: a search chooses by what clients measure",
        ),
        (
            [],
            {
                "privacy": {
                    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.1,
                    "seeded_noise": True,
                }
            },
            "privacy.unit: a search chooses by what clients measure",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    tables: dict[str, Any],
    pattern: str,
) -> None:
    out = tmp_path / "out"
    assert command_line(["tune", str(job_file(tmp_path, **tables)), *arguments, "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and pattern in line, line
    assert not out.exists()


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = job_file(tmp_path), tmp_path / "out"
    space = Space.of(["train.lr=0.1,1.0"], [])
    out.mkdir()
    base = Base.load(path, [], [])
    SearchFolder(out).opened(base, space, seed=3, seeds=1, at_once=1)
    said = ["tune", str(path), "--out", str(out)]
    assert command_line([*said, "--vary", "train.lr=0.1,2.0"]) == 2
    assert "holds a search with another space" in capsys.readouterr().err
    assert command_line([*said, "--vary", "train.lr=0.1,1.0", "--seeds", "2"]) == 2
    assert "holds a search with another seeds" in capsys.readouterr().err
    assert command_line(["tune", str(path), "--vary", "train.lr=1,2", "--out", str(tmp_path)]) == 2
    assert "no search's folder" in capsys.readouterr().err
    assert command_line(["tune", str(path), "--vary", "train.lr=1,2", "--out", str(path)]) == 2
    assert "found a file" in capsys.readouterr().err
    (out / "tune.json").write_text("{")
    assert command_line([*said, "--vary", "train.lr=0.1,1.0"]) == 2
    assert "damaged" in capsys.readouterr().err
    (out / "study.db").write_text("no database")
    with pytest.raises(ConfigError, match=r"study\.db: damaged"):
        Search(out, base, space, 3, 1, 1, None).trials()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tuned.toml"]


@pytest.mark.slow
@pytest.mark.processes
def test_a_search_finds_what_a_grid_finds_and_leaves_a_job_that_replays_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = job_file(tmp_path), tmp_path / "out"
    vary = [part for values in GRID for part in ("--vary", values)]
    given = ["tune", str(path), *vary, "--trials", "6", "--workers", "2", "--out", str(out)]
    assert command_line(given) == 0
    said = capsys.readouterr().out
    assert said.count("\ntrial ") == 6 and f"atoll simulate {out / 'best.toml'}" in said
    lines = lines_of(out)
    assert lines[0]["train.lr"] == "0.001" and lines[0]["strategy.name"] == "fedavg"  # the job as it is
    best = max(lines, key=lambda line: float(line["accuracy"] or 0))
    # Of the whole grid three of twelve are above 0.8, with a rate of 1; the job as it is stays near chance.
    assert float(best["accuracy"]) > 0.8 > 0.4 > float(lines[0]["accuracy"])
    assert (out / "trials.png").read_bytes().startswith(b"\x89PNG")
    replayed = simulate(Job.load(out / "best.toml"), tmp_path / "best", on_event=ignore_events, report=False)
    kept = json.loads((out / best["folder"] / "seed-3" / "result.json").read_text())
    assert replayed.model_sha256 == kept["model_sha256"]
    assert replayed.final["server"]["accuracy"] > 0.8
    before = {file: file.stat().st_mtime_ns for file in out.glob("trial-*/*/result.json")}
    assert command_line(given) == 0
    assert "all are there" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("trial-*/*/result.json")}
    assert lines_of(out) == lines


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_search_goes_on_and_ends_with_the_same_trials(tmp_path: Path) -> None:
    path = job_file(tmp_path)
    given = ["--range", "train.lr=0.001..3,log", "--vary", "train.epochs=1,4", "--trials", "6"]
    tables = []
    for name in ("whole", "killed"):
        out = tmp_path / name
        command = ["tune", path, *given, "--workers", "2", "--out", out]
        if name == "killed":
            for count, kill in ((1, signal.SIGKILL), (2, signal.SIGINT)):
                process = atoll(
                    *command, main="tests.support.pausing:main", env={"ATOLL_TEST_PAUSE_AFTER": str(count)}
                )
                assert process.stdout is not None
                assert any(line == "paused\n" for line in process.stdout)
                process.send_signal(kill)
                _, said = process.communicate()
                assert process.returncode == (130 if kill is signal.SIGINT else -signal.SIGKILL), said
                assert kill is signal.SIGKILL or "the same command goes on" in said
        process = atoll(*command)
        assert process.communicate()[1] == "" and process.returncode == 0
        tables.append([line | {"seconds": ""} for line in lines_of(out)])
    assert len(tables[0]) == 6
    assert tables[0] == tables[1]
    assert (tmp_path / "whole/best.toml").read_bytes() == (tmp_path / "killed/best.toml").read_bytes()
