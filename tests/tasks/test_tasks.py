"""Every task through the one seam: each way of tuning, each engine, shards written and read back."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.dp.per_example_gradients import hooks_suffice, per_example_gradients
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.compatibility import check_fits
from atoll.learning.learner import Learner, sum_states
from atoll.protocol.tensors import Tensors
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.sim.population.write_shards import write_shards
from atoll.tasks import TASKS, task_named
from tests.job.job_grid import COSTLY
from tests.support.task_data import ready
from tests.support.task_jobs import DRAWING, TABLES, job_of

METHODS = ("head", "last-k", "lora", "full")
REFUSED = {
    ("image-text", "last-k"): "no last block of both",
    ("forecasting", "lora"): "no linear layer",
    ("forecasting", "last-k"): "no blocks",
    ("survival", "lora"): "no blocks",
    ("survival", "last-k"): "no blocks",
    ("speech-recognition", "lora"): "no layer for LoRA",
}
NOT_BY_EXAMPLE = {
    "object-detection": r"privacy\.unit: object-detection has no example-level privacy.*losses are shared",
    "survival": r"privacy\.unit: survival has no example-level privacy.*compares the examples of a batch",
    "speech-recognition": r"privacy\.unit = 'example': neither CTC nor a recurrent layer.*speech-recognition",
}
"""Why there is no example-level privacy."""

ALL = [(task, method) for task in TABLES for method in METHODS]
WORKING = [pair for pair in ALL if pair not in REFUSED]


def cases(pairs: Iterable[tuple[str, str]], always: Container[tuple[str, str]]) -> list[Any]:
    """Pairs of a task and a way of tuning; those that aren't always tried are tried with the matrix."""
    return [
        pytest.param(pair, marks=[] if pair in always else pytest.mark.matrix, id="-".join(pair))
        for pair in pairs
    ]


Runs = Callable[[str, str], tuple[Job, RunResult]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A pair's job, and its run in one process: several tests compare others with it."""

    @cache
    def run(task: str, method: str) -> tuple[Job, RunResult]:
        folder = tmp_path_factory.mktemp(f"{task}-{method}")
        job = ready(small(task, method), folder)
        return job, simulate(job, folder / "one", on_event=ignore_events, report=False)

    return run


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    task, method = request.param
    return ready(small(task, method), tmp_path)


FEW: dict[str, dict[str, Any]] = {
    "image-text": {
        "data": {"source": "written"},
        "train": {"lr": 0.001, "batch_size": 8, "optimizer": "adam"},
    },
    "recommendation": {
        "data": {"source": "written"},
        "train": {"lr": 0.01, "batch_size": 32, "optimizer": "adam"},
    },
    "intent": {
        "data": {"source": "written"},
        "train": {"lr": 0.01, "batch_size": 32, "optimizer": "adam"},
    },
    "segmentation": {"train": {"lr": 0.0002, "batch_size": 2, "optimizer": "adam", "steps": 2}},
    "object-detection": {"train": {"lr": 0.0003, "batch_size": 4, "optimizer": "adam", "steps": 2}},
}
"""Of whose data a part is enough here, or a few steps; as it is: `tests/repository/test_golden.py`."""


def small(task: str, method: str, **more: Any) -> Job:
    """The task's small job, on fewer data or with fewer steps where it takes long."""
    return job_of(task, method, **(FEW.get(task, {}) | more))


def test_every_task_has_a_small_job() -> None:
    assert set(TABLES) == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_registry_says_what_the_task_says_of_itself(name: str) -> None:
    task, entry = task_named(name), TASKS[name]
    assert (task.name, task.summary, task.primary_metric) == (name, entry.summary, entry.primary_metric)


@pytest.mark.slow
@pytest.mark.parametrize("pair", cases(WORKING, [p for p in WORKING if p[1] in ("head", "full")]))
def test_each_way_of_tuning_learns_and_has_the_same_bits_in_another_engine(
    pair: tuple[str, str], runs: Runs, tmp_path: Path
) -> None:
    job, result = runs(*pair)
    other = simulate(job, tmp_path / "two", engine="loop", on_event=ignore_events, report=False)
    assert result.model_sha256 == other.model_sha256
    losses = [line["loss"] for line in result.rounds]
    assert losses[-1] < losses[0], losses
    headline = TASKS[job.task.name].primary_metric
    assert all(headline in values for values in result.final["clients"].values())


TWO_WORKERS = (("recommendation", "full"), ("object-detection", "full"), ("text-classification", "lora"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", cases(WORKING, TWO_WORKERS))
@pytest.mark.processes
def test_each_way_of_tuning_has_the_same_bits_with_two_workers(
    pair: tuple[str, str], runs: Runs, tmp_path: Path
) -> None:
    job, result = runs(*pair)
    pooled = simulate(job, tmp_path / "pool", workers=2, on_event=ignore_events, report=False)
    assert pooled.model_sha256 == result.model_sha256


FULL = [(task, "full") for task in TABLES]


@pytest.mark.slow
@pytest.mark.parametrize("pair", cases(FULL, [("forecasting", "full")]))
@pytest.mark.processes
def test_each_task_has_the_same_bits_on_ray(pair: tuple[str, str], runs: Runs, tmp_path: Path) -> None:
    job, result = runs(*pair)
    spread = simulate(job, tmp_path / "ray", engine="ray", workers=2, on_event=ignore_events, report=False)
    assert spread.model_sha256 == result.model_sha256


@pytest.mark.slow
@pytest.mark.matrix
def test_what_a_detector_draws_is_the_same_in_two_processes(tmp_path: Path) -> None:
    job = ready(job_of("object-detection", "head", backbone=DRAWING), tmp_path)
    results = [
        simulate(job, tmp_path / name, on_event=ignore_events, report=False, **options)
        for name, options in (("one", {}), ("loop", {"engine": "loop"}), ("pool", {"workers": 2}))
    ]
    assert len({result.model_sha256 for result in results}) == 1
    assert results[0].rounds[-1]["loss"] < results[0].rounds[0]["loss"]


@pytest.mark.parametrize("job", list(REFUSED), indirect=True, ids=lambda pair: "-".join(pair))
def test_a_way_of_tuning_that_a_task_has_not_is_refused_by_name(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[job.task.name, job.tune.method]):
        simulate(job, tmp_path / "out", on_event=ignore_events, report=False)


def learner_of(job: Job) -> tuple[Learner, Population]:
    """What the job's clients share, and the clients."""
    population, kind = Population.of(job), task_named(job.task.name)
    data_info = kind.merge_info([kind.local_info(population.train, job.data, job.task.options)])
    return Learner.of(job, kind, data_info), population


@dataclass(frozen=True)
class Ready:
    """A task's small job with a head, its clients, what they share, and the tensors that they begin with."""

    job: Job
    learner: Learner
    population: Population
    initial: Tensors


@pytest.fixture(scope="module")
def with_head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    job = ready(small(request.param, "head"), tmp_path_factory.mktemp("head"))
    learner, population = learner_of(job)
    return Ready(job, learner, population, learner.initial())


def of_tasks(tasks: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("with_head", tasks, indirect=True, scope="module")


@pytest.mark.parametrize("job", cases(WORKING, [p for p in WORKING if p[1] == "lora"]), indirect=True)
def test_the_loss_reaches_everything_that_travels(job: Job) -> None:
    learner, population = learner_of(job)
    trainable.training_mode(learner.model)
    loss_of(learner, population.whole(learner), range(4)).backward()  # type: ignore[no-untyped-call]
    tuned = trainable.trainable(learner.model)
    assert tuned and not [name for name, p in tuned.items() if p.grad is None]


def loss_of(learner: Learner, shard: Shard, rows: range) -> torch.Tensor:
    return learner.task.loss(learner.model(learner.collate(shard, rows)), shard.targets_of(rows))


@pytest.mark.parametrize("task", TABLES)
def test_shards_read_back_as_they_were_written(task: str, tmp_path: Path) -> None:
    job = ready(small(task, "head"), tmp_path)
    names = write_shards(job, tmp_path / "shards")
    population, kind = Population.of(job), task_named(task)
    for name in names:
        rows = population.dataset(job, name)
        again = kind.read(tmp_path / "shards" / name, job.data, job.task.options).train
        assert len(rows) > 1
        assert sorted(kind.keys(rows)) == sorted(kind.keys(again))


COMPARING = [task for task in TABLES if task_named(task).compares_examples]
"""Whose losses and metrics are of pairs within a client: `tests/tasks/test_survival.py` has theirs."""
ADDING = [task for task in TABLES if task not in COMPARING]


@of_tasks(ADDING)
def test_metrics_of_two_clients_add_up_to_those_of_all_data(with_head: Ready) -> None:
    job, learner, population = with_head.job, with_head.learner, with_head.population
    shards = [
        learner.task.shard(population.dataset(job, name), learner.data_info) for name in population.names(job)
    ]
    whole, tensors = population.whole(learner), with_head.initial
    apart = learner.compute(sum_states(learner.evaluate(tensors, shard) for shard in shards))
    together = learner.compute(learner.evaluate(tensors, whole))
    assert apart.keys() == together.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=2e-5), name


@of_tasks(TABLES)
def test_an_examples_prediction_depends_on_no_other_example(with_head: Ready) -> None:
    learner, tensors = with_head.learner, with_head.initial
    shard = with_head.population.whole(learner).select(range(4))
    together = learner.predictions(tensors, [shard.inputs[row] for row in range(4)])
    for row in range(4):
        assert_same(learner.predictions(tensors, [shard.inputs[row]])[0], together[row])


@of_tasks(ADDING)
def test_the_measured_loss_is_the_mean_of_what_each_example_costs_alone(with_head: Ready) -> None:
    learner = with_head.learner
    shard = with_head.population.whole(learner).select(range(4))
    # To a model that is as at the start all preferences cost the same.
    tensors = {name: 1.1 * tensor for name, tensor in with_head.initial.items()}
    together, *alone = (
        learner.compute(learner.evaluate(tensors, shard.select(rows)))["loss"]
        for rows in ([0, 1, 2, 3], [0], [1], [2], [3])
    )
    counts = [learner.task.num_with_target(shard.targets_of([row])) for row in range(4)]
    assert len(set(alone)) > 1
    assert together == pytest.approx(np.average(alone, weights=counts), rel=2e-5)


@of_tasks(["recommendation"])
def test_the_loss_of_items_that_nobody_knows_is_undefined(with_head: Ready) -> None:
    learner, tensors = with_head.learner, with_head.initial
    shard = with_head.population.whole(learner).select(range(4))
    unknown = shard.table.clone()
    unknown[:, -1] = -1
    known_loss = learner.compute(learner.evaluate(tensors, shard.select([0])))["loss"]
    lost = replace(shard, targets=unknown)
    assert learner.compute(learner.evaluate(tensors, lost))["loss"] is None
    half = [learner.evaluate(tensors, part) for part in (shard.select([0]), lost)]
    assert learner.compute(sum_states(half))["loss"] == pytest.approx(known_loss)


def assert_same(one: Any, other: Any) -> None:
    """Texts to the letter, numbers nearly, in whatever they are put."""
    if isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_same(value, other[name])
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5, equal_nan=True)
    else:
        assert one == other


BY_EXAMPLE = [task for task in TABLES if task not in NOT_BY_EXAMPLE]
PRIVATE = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.2, "seeded_noise": True,
}  # fmt: skip


@pytest.mark.parametrize("task", BY_EXAMPLE)
def test_each_example_has_its_own_gradient_as_if_it_were_alone(task: str, tmp_path: Path) -> None:
    """What example-level privacy clips: against autograd on batches of one."""
    learner, population = learner_of(ready(job_of(task, "full", privacy=PRIVATE), tmp_path))
    rows = range(4)
    shard = population.whole(learner).select(rows)
    batch, targets = learner.collate(shard, rows), shard.targets_of(rows)
    learner.model.eval()
    hooks = hooks_suffice(learner.model, learner.task.loss, batch, targets)
    with per_example_gradients(learner.model, learner.task.loss, hooks=hooks) as gradients:
        found = gradients(batch, targets)
    for row in rows:
        learner.model.zero_grad()
        alone = {name: t[row : row + 1] for name, t in batch.items()}
        learner.task.loss(learner.model(alone), targets[row : row + 1]).backward()  # type: ignore[no-untyped-call]
        for name, p in learner.model.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            of_row = found.get(name, torch.zeros(4, *p.shape))[row]
            assert float((of_row - expected).norm()) <= 1e-5 + 1e-4 * float(expected.norm()), name


ONE_ROUND = {"clients": 2, "rounds": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair",
    cases(
        [pair for pair in WORKING if pair[0] in BY_EXAMPLE],
        [(task, "head") for task in BY_EXAMPLE if task in COSTLY]
        + [("question-answering", "full"), ("forecasting", "full")],
    ),
)
def test_each_task_trains_under_example_level_privacy(pair: tuple[str, str], tmp_path: Path) -> None:
    """The others: `tests/privacy/runs/test_leaks.py`."""
    task, method = pair
    train = {"lr": 0.01, "optimizer": "sgd"}
    few = PRIVATE | {"steps": 2}
    job = ready(job_of(task, method, privacy=few, train=train, federation=ONE_ROUND), tmp_path)
    result = simulate(job, tmp_path / "out", on_event=ignore_events, report=False)
    assert result.privacy["unit"] == "example" and result.privacy["epsilon"] > 0


@pytest.mark.parametrize("task", NOT_BY_EXAMPLE)
def test_example_level_privacy_that_a_task_cannot_keep_is_refused_and_why(task: str, tmp_path: Path) -> None:
    job = ready(job_of(task, "head", privacy=PRIVATE), tmp_path)
    with pytest.raises(ConfigError, match=NOT_BY_EXAMPLE[task]) as told:
        simulate(job, tmp_path / "out", on_event=ignore_events, report=False)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("task", TABLES)
def test_unknown_options_are_one_line_that_names_them(task: str, tmp_path: Path) -> None:
    job = ready(job_of(task, "head"), tmp_path)
    odd = job.model_copy(update={"task": job.task.model_copy(update={"options": {"histroy": 3}})})
    with pytest.raises(ConfigError, match=r"task\.options.*histroy") as told:
        check_fits(odd, task_named(task))
    assert "\n" not in str(told.value)
