"""Survival: Cox's loss, the concordance index, and tables with censoring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from numpy.typing import NDArray

from atoll.api import Run
from atoll.data.dataset import Dataset
from atoll.datasets.synthetic.tables.patients import EFFECTS, MEANS, generated_patients
from atoll.errors import ConfigError, DataError, WeightsError
from atoll.job.job import DataSection, Job
from atoll.learning.compatibility import check_fits
from atoll.learning.learner import Learner, sum_states
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from atoll.tasks.survival import loss as loss_module
from atoll.tasks.survival import metrics as metrics_module
from atoll.tasks.survival.loss import cox_loss
from atoll.tasks.survival.metrics import ConcordanceIndex

Floats = NDArray[np.float64]
NAMES = tuple(sorted(MEANS))


def job_of(**tables: Any) -> Job:
    table: dict[str, Any] = {
        "name": "patients",
        "seed": 5,
        "task": {"name": "survival", "options": {"features": NAMES}},
        "data": {"source": "generated-patients", "partition": {"kind": "natural", "by": "hospital"}},
        "backbone": {"name": "atoll:linear", "weights": "random"},
        "tune": {"method": "full"},
        "train": {"lr": 0.05, "batch_size": 32},
        "federation": {"clients": 6, "rounds": 2},
    }
    return Job.parse(table | tables, origin="test")


def drawn(seed: int, count: int, *, tied: bool = True) -> tuple[Floats, Floats, Floats]:
    """Scores, times and events; with ties in all of them."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=count), 1)
    times = rng.integers(0, max(2, count // 2), count).astype(float) if tied else rng.permutation(count) + 1.0
    return scores, times, rng.integers(0, 2, count).astype(float)


# The loss


def likelihood_by_hand(scores: Floats, times: Floats, events: Floats) -> float:
    """Patient by patient, in float64."""
    total = 0.0
    for i in range(len(scores)):
        if events[i]:
            at_risk = [np.exp(scores[j]) for j in range(len(scores)) if times[j] >= times[i]]
            total -= scores[i] - np.log(sum(at_risk))
    return total / len(scores)


def gradient_by_hand(scores: Floats, times: Floats, events: Floats) -> Floats:
    """d loss / d score_k: -1/n (event_k - sum over events i with t_k >= t_i of k's part of i's softmax)."""
    found = np.zeros(len(scores))
    for i in np.flatnonzero(events):
        at_risk = times >= times[i]
        found += np.where(at_risk, np.exp(scores), 0) / np.exp(scores[at_risk]).sum()
        found[i] -= 1
    return found / len(scores)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [1, 2, 8, 30])
@pytest.mark.parametrize("rows", [512, 7])
def test_loss_and_gradient_are_those_of_loops_in_float64(
    count: int, rows: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "ROWS", rows)
    for seed in range(5):
        scores, times, events = drawn(seed, count, tied=tied)
        given = torch.from_numpy(scores).requires_grad_()
        found = cox_loss(given, torch.from_numpy(times), torch.from_numpy(events))
        found.backward()  # type: ignore[no-untyped-call]
        assert found.item() == pytest.approx(likelihood_by_hand(scores, times, events), abs=1e-12)
        np.testing.assert_allclose(given.grad, gradient_by_hand(scores, times, events), atol=1e-12)


def test_the_loss_of_three_patients_by_hand() -> None:
    # Events at 1 and 3, censored at 2; scores 0, log 2, log 3: risk sets have 1 + 2 + 3 and 3.
    scores = torch.log(torch.tensor([1.0, 2.0, 3.0]))
    found = cox_loss(scores, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert float(found) == pytest.approx((np.log(6 / 1) + np.log(3 / 3)) / 3)


def test_a_batch_without_an_event_teaches_nothing_and_large_scores_stay_finite() -> None:
    scores = torch.tensor([1e4, -1e4, 3e4], requires_grad=True)
    quiet = cox_loss(scores, torch.arange(3.0), torch.zeros(3))
    quiet.backward()  # type: ignore[no-untyped-call]
    assert quiet.item() == 0 and scores.grad is not None and not scores.grad.any()
    loud = cox_loss(scores, torch.arange(3.0), torch.ones(3))
    loud.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loud) and torch.isfinite(scores.grad).all()


def test_a_number_added_to_every_score_changes_nothing() -> None:
    scores, times, events = map(torch.from_numpy, drawn(3, 20))
    assert float(cox_loss(scores + 7, times, events)) == pytest.approx(float(cox_loss(scores, times, events)))


# The concordance index


def pairs_by_hand(scores: Floats, times: Floats, events: Floats) -> tuple[float, int]:
    """(concordant pairs, ties by halves; comparable pairs): every two patients, in both orders of time."""
    right, pairs = 0.0, 0
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            if times[i] == times[j]:
                if events[i] == events[j]:
                    continue
                first, other = (i, j) if events[i] else (j, i)
            else:
                first, other = (i, j) if times[i] < times[j] else (j, i)
                if not events[first]:
                    continue
            pairs += 1
            right += 0.5 if scores[first] == scores[other] else float(scores[first] > scores[other])
    return right, pairs


def index_of(*clients: tuple[Floats, Floats, Floats]) -> float:
    metric = ConcordanceIndex()
    for scores, times, events in clients:
        metric.update(torch.from_numpy(scores), torch.from_numpy(np.stack([times, events], axis=1)))
    return float(metric.compute())


@pytest.mark.parametrize("rows", [1024, 3])
def test_the_index_is_that_of_all_pairs_one_by_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "ROWS", rows)
    for seed in range(30):
        given = drawn(seed, 2 + seed, tied=seed % 3 > 0)
        right, pairs = pairs_by_hand(*given)
        assert (
            index_of(given) == pytest.approx(right / pairs, abs=1e-12) if pairs else np.isnan(index_of(given))
        )


def test_pairs_of_clients_add_up_and_none_is_formed_across_them() -> None:
    one, other = drawn(1, 12), drawn(2, 25)
    (right, pairs), (more_right, more_pairs) = pairs_by_hand(*one), pairs_by_hand(*other)
    assert index_of(one, other) == pytest.approx((right + more_right) / (pairs + more_pairs))
    together = tuple(np.concatenate(parts) for parts in zip(one, other, strict=True))
    assert index_of(one, other) != pytest.approx(index_of(together))  # type: ignore[arg-type]


def test_without_a_comparable_pair_it_is_undefined() -> None:
    times = np.array([1.0, 2.0, 3.0])
    assert np.isnan(index_of((times, times, np.zeros(3))))
    assert np.isnan(index_of((times, times, np.array([0.0, 0.0, 1.0]))))  # nobody is left then


def learner_of(job: Job) -> tuple[Learner, Population]:
    population, task = Population.of(job), task_named("survival")
    return Learner.of(job, task, task.local_info(population.train, job.data, job.task.options)), population


def test_a_client_is_measured_as_a_whole_and_clients_add_up() -> None:
    learner, population = learner_of(job_of())
    tensors, names = learner.initial(), population.names(learner.job)
    states, right, pairs, losses, patients = [], 0.0, 0, 0.0, 0
    for name in names:
        shard = learner.task.shard(population.dataset(learner.job, name), learner.data_info)
        rows = np.array([[row[n] for n in NAMES] for row in shard.inputs], dtype=np.float32)
        weight = tensors["head.weight"].numpy()[0]
        scores = learner.predictions(tensors, [shard.inputs[i] for i in range(len(shard))]).numpy()
        np.testing.assert_allclose(scores, rows @ weight, rtol=1e-4, atol=1e-4)
        times, events = shard.table.numpy().T
        found = pairs_by_hand(scores, times, events)
        right, pairs = right + found[0], pairs + found[1]
        losses += len(shard) * likelihood_by_hand(scores.astype(float), times, events)
        patients += len(shard)
        states.append(learner.evaluate(tensors, shard))
    assert len(states) == 6
    values = learner.compute(sum_states(states))
    assert values["c_index"] == pytest.approx(right / pairs, abs=1e-12)
    assert values["loss"] == pytest.approx(losses / patients, rel=1e-4)


def test_a_client_without_events_has_no_index() -> None:
    learner, population = learner_of(job_of())
    rows = population.dataset(learner.job, "client-0001").select(range(20))
    table = rows.table.take(pa.array(range(20)))
    quiet = Dataset(table.drop_columns(["event"]).append_column("event", pa.array([False] * 20)))
    values = learner.compute(
        learner.evaluate(learner.initial(), learner.task.shard(quiet, learner.data_info))
    )
    assert values["c_index"] is None and values["loss"] == 0


# Learning


def newton(rows: Floats, times: Floats, events: Floats, strata: list[str]) -> Floats:
    """The maximum of the partial likelihood over strata, each with a baseline of its own."""
    beta = np.zeros(rows.shape[1])
    for _ in range(12):
        gradient, curvature = np.zeros_like(beta), np.zeros((len(beta), len(beta)))
        for stratum in sorted(set(strata)):
            own = np.array([one == stratum for one in strata])
            x, t = rows[own], times[own]
            weights = np.exp(x @ beta)
            for i in np.flatnonzero(events[own]):
                w = np.where(t >= t[i], weights, 0)
                mean = w @ x / w.sum()
                gradient += x[i] - mean
                curvature += (x.T * w) @ x / w.sum() - np.outer(mean, mean)
        beta = beta + np.linalg.solve(curvature, gradient)
    return beta


def test_the_generated_patients_are_of_the_model_that_they_are_said_to_be_of() -> None:
    table = generated_patients()["train"]
    rows = np.stack([table.column(name).to_numpy() for name in NAMES], axis=1)
    times, events = table.column("time").to_numpy(), table.column("event").to_numpy().astype(float)
    assert 0.2 < events.mean() < 0.6
    found = newton(rows - [MEANS[n] for n in NAMES], times, events, table.column("hospital").to_pylist())
    for name, value in zip(NAMES, found, strict=True):
        # Three standard errors at about 400 events, by the deviation of each feature.
        assert abs(value - EFFECTS.get(name, 0.0)) < 3.5 / (20 * rows[:, NAMES.index(name)].std()), name


def test_one_client_in_one_batch_climbs_to_the_maximum_of_the_partial_likelihood(tmp_path: Path) -> None:
    scale = {"means": [MEANS[n] for n in NAMES], "deviations": [11.0, 1.0, 1.0, 9.0, 12.0, 1.0]}
    job = job_of(
        task={"name": "survival", "options": {"features": NAMES, **scale}},
        data={"source": "generated-patients", "test_fraction": 0.0, "validation_fraction": 0.0},
        federation={"clients": 1, "rounds": 1},
        train={"lr": 1.0, "momentum": 0.5, "batch_size": 2000, "steps": 75},
    )
    simulate(job, tmp_path / "run", on_event=ignore_events, report=False)
    table = generated_patients()["train"]
    columns = [(table.column(n).to_numpy() - m) / d for n, m, d in zip(NAMES, *scale.values(), strict=True)]
    best = newton(
        np.stack(columns, axis=1), table.column("time").to_numpy(),
        table.column("event").to_numpy().astype(float), ["all"] * table.num_rows,
    )  # fmt: skip
    from atoll.trained import model_of

    np.testing.assert_allclose(model_of(tmp_path / "run")["head.weight"][0], best, atol=5e-3)


def test_engines_and_workers_agree_to_the_bit(tmp_path: Path) -> None:
    job = job_of(train={"lr": 0.001, "batch_size": 8, "steps": 9}, strategy={"name": "fedadam"})
    whole, looped = (
        simulate(job, tmp_path / engine, engine=engine, on_event=ignore_events, report=False)
        for engine in ("inline", "loop")
    )
    assert whole.model_sha256 == looped.model_sha256
    assert whole.final["clients"].keys() == {f"client-{number:04d}" for number in range(6)}


def test_client_level_privacy_is_there_and_example_level_is_not(tmp_path: Path) -> None:
    client = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-2, "seeded_noise": True}
    result = simulate(job_of(privacy=client), tmp_path / "run", on_event=ignore_events, report=False)
    assert result.privacy["unit"] == "client" and result.privacy["epsilon"] > 0
    unnamed = job_of(privacy=client, task={"name": "survival"})
    with pytest.raises(ConfigError, match=r"task\.options\.features: missing, expected the names"):
        check_fits(unnamed.model_copy(update={"data": DataSection(source="/here")}), task_named("survival"))


# Tables

HEAD = "t,status,age,grade,pid,centre\n"
ROWS = "10,1,50,2,p-1,a\n12.5,0,61.5,1,p-2,b\n"


def read(path: Path, **options: Any) -> Any:
    return task_named("survival").read(path, DataSection(source=str(path)), options).train


def written(folder: Path, text: str, name: str = "patients.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_columns_of_numbers_are_features_unless_the_job_names_them(tmp_path: Path) -> None:
    path = written(tmp_path, HEAD + ROWS)
    rows = read(path)
    assert rows[0] == {
        "time": 10.0, "event": True, "features": {"age": 50.0, "grade": 2.0}, "pid": "p-1", "centre": "a",
    }  # fmt: skip
    assert read(path, features=["grade"])[1]["features"] == {"grade": 1.0}
    table = task_named("survival").read(path, DataSection(source=str(path)), {})
    assert any("features are age, grade" in note for note in table.notes)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    plain = read(written(tmp_path, HEAD + ROWS))
    records = [
        {"t": 10, "status": True, "age": 50, "grade": 2, "pid": "p-1", "centre": "a"},
        {"t": 12.5, "status": False, "age": 61.5, "grade": 1, "pid": "p-2", "centre": "b"},
    ]
    path = tmp_path / f"same.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in records))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    again = read(path)
    assert [again[row] for row in range(2)] == [plain[row] for row in range(2)]
    task = task_named("survival")
    assert task.keys(again) == task.keys(plain)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("-1,1,50,2,p,a", r"patients\.csv.*4: time: -1, expected 0 or more"),
        (",1,50,2,p,a", r"patients\.csv.*4: time: nothing, expected a number"),
        ("soon,1,50,2,p,a", r"patients\.csv.*4: time: 'soon', expected a number"),
        ("1,2,50,2,p,a", r"patients\.csv.*4: event: 2, expected 1 \(seen\), 0 \(censored\), true or false"),
        ("1,dead,50,2,p,a", r"patients\.csv.*4: event: 'dead', expected 1"),
        ("1,,50,2,p,a", r"patients\.csv.*4: event: nothing, expected 1"),
        ("1,1,old,2,p,a", r"patients\.csv.*4: age: 'old', expected a number"),
        ("1,1,50,,p,a", r"patients\.csv.*4: grade: nothing, expected a number"),
        ("1,1,50,inf,p,a", r"patients\.csv.*4: grade: inf, expected a finite number"),
    ],
)
def test_a_bad_value_is_told_with_its_file_and_line(row: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said) as told:
        read(written(tmp_path, HEAD + ROWS + row + "\n"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("cell", ["1", "1.0", "true", "True"])
def test_an_event_may_be_written_in_several_ways(cell: str, tmp_path: Path) -> None:
    assert read(written(tmp_path, f"time,event,age\n1,{cell},2\n"))[0]["event"] is True


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("event,age\n1,2\n", {}, "expected one for the time"),
        ("time,event,name\n1,1,x\n", {}, "expected some of numbers as features"),
        (HEAD + ROWS, {"features": ["weight"]}, "expected one called 'weight'"),
    ],
)
def test_a_table_without_what_is_needed_is_refused(
    text: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        read(written(tmp_path, text), **options)


def test_clients_with_different_columns_are_told_which() -> None:
    task = task_named("survival")
    with pytest.raises(ConfigError, match=r"task\.options\.features: clients have different .*: smoker"):
        task.merge_info([{"features": ["age"]}, {"features": ["age", "smoker"]}])
    assert task.merge_info([{"features": ["b", "a"]}, {"features": ["a", "b"]}]) == {"features": ["b", "a"]}


def options(**given: Any) -> Job:
    return job_of(task={"name": "survival", "options": given})


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (options(features=["a", "a"]), r"features: 'a' is there twice"),
        (options(features=["a"], means=[1.0]), r"deviations: missing, expected both"),
        (
            options(features=["a"], means=[1.0, 2.0], deviations=[1.0, 1.0]),
            r"means: 2 numbers for 1 features",
        ),
        (options(means=[1.0], deviations=[1.0]), r"means: 1 numbers for 0 features"),
        (
            options(features=["a"], means=[1.0], deviations=[0.0]),
            r"task\.options: deviations\.0: expected greater than 0",
        ),
        (job_of(train={"accumulate": 2, "batch_size": 8}), r"train\.accumulate: expected 1 for survival"),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(job: Job, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as told:
        check_fits(job, task_named("survival"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("backbone", "error", "said"),
    [
        ({"name": "atoll:gru", "weights": "random"}, WeightsError, "does not read tables of features"),
        ({"name": "atoll:linear", "weights": "random", "options": {"width": 3}}, ConfigError, "no options"),
        ({"name": "atoll:mlp", "weights": "random", "options": {"depth": 3}}, ConfigError, "depth"),
    ],
)
def test_another_network_is_refused(backbone: dict[str, Any], error: type[Exception], said: str) -> None:
    learner, _ = learner_of(job_of(backbone=backbone))
    with pytest.raises(error, match=said):
        learner.initial()


def test_an_mlp_has_the_layers_that_it_is_asked_for() -> None:
    wide = {"name": "atoll:mlp", "weights": "random", "options": {"width": 5, "layers": 2, "dropout": 0.1}}
    shapes = {n: tuple(t.shape) for n, t in learner_of(job_of(backbone=wide))[0].initial().items()}
    assert sorted(shapes.values()) == [(1, 5), (5,), (5,), (5, 5), (5, 6)]
    linear = learner_of(job_of())[0].initial()
    assert {name: tuple(tensor.shape) for name, tensor in linear.items()} == {"head.weight": (1, 6)}


def test_predictions_are_scores_of_patients_in_units_of_the_job(tmp_path: Path) -> None:
    scaled = {"features": ["age", "grade"], "means": [60.0, 2.0], "deviations": [10.0, 1.0]}
    job = options(**scaled)
    simulate(job, tmp_path / "run", on_event=ignore_events, report=False)
    from atoll.trained import model_of

    weight = model_of(tmp_path / "run")["head.weight"][0].double().numpy()
    row = {"age": 75, "grade": 3, "pulse": 70}
    [answer] = Run(tmp_path / "run").predict([json.dumps(row)])
    assert answer["score"] == pytest.approx(weight @ [1.5, 1.0], rel=1e-5)
    assert answer["relative_hazard"] == pytest.approx(np.exp(weight @ [1.5, 1.0]), rel=1e-5)
    assert answer["label"] == f"{answer['score']:.4g}"


def test_a_table_of_patients_has_a_score_a_row(run: Callable[[], Run], tmp_path: Path) -> None:
    rows = [{"age": 75, "grade": 3, "who": "a"}, {"age": 40, "grade": 1, "who": "b"}]
    alone = [run().predict([json.dumps(row)])[0]["score"] for row in rows]
    (tmp_path / "new.csv").write_text("who,grade,age\na,3,75\nb,1,40\n")
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in (tmp_path / "new.csv", tmp_path / "new.jsonl"):
        answers = run().predict([str(given)])
        assert [answer["series"] for answer in answers] == ["row 1", "row 2"]
        assert [answer["score"] for answer in answers] == pytest.approx(alone, rel=1e-6)
    for text, said in (
        ("who,age\na,75\n", "expected the feature 'grade'"),
        ("grade,age\n1,75\n1,old\n", r"new\.csv.*3.*age.*'old', expected a number"),
        ("grade,age\n", "no rows, expected one for each patient"),
    ):
        (tmp_path / "new.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            run().predict([str(tmp_path / "new.csv")])


def test_without_named_features_the_columns_of_numbers_are_taken(tmp_path: Path) -> None:
    simulate(options(), tmp_path / "run", on_event=ignore_events, report=False)
    names = Job.load(tmp_path / "run" / "job.toml").task.options
    assert not names
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["facts"]["features"]
    (tmp_path / "new.csv").write_text(
        ",".join(["name", *trained]) + "\n" + ",".join(["x", *"1" * len(trained)]) + "\n"
    )
    [answer] = Run(tmp_path / "run").predict([str(tmp_path / "new.csv")])
    row = json.dumps(dict.fromkeys(trained, 1))
    assert answer["score"] == pytest.approx(Run(tmp_path / "run").predict([row])[0]["score"], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("75", "expected features as JSON"),
        ('{"age": 75}', "no 'grade', expected a number for each feature"),
        ('{"age": "x", "grade": 1}', "age: 'x', expected a number"),
    ],
)
def test_an_input_that_is_none_is_refused(given: str, said: str, run: Callable[[], Run]) -> None:
    with pytest.raises(DataError, match=said):
        run().predict([given])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Run]:
    folder = tmp_path_factory.mktemp("survival") / "run"
    simulate(options(features=["age", "grade"]), folder, on_event=ignore_events, report=False)
    return lambda: Run(folder)
