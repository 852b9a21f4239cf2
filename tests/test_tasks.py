"""Every task through the one seam: each way of tuning, each engine, shards written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from client.gradients import hooks_suffice, per_example_gradients
from protocol.errors import ConfigError
from protocol.job import Job
from sim.engine import simulate
from sim.population import Population
from sim.shards import write_shards
from tasks import TASKS, task_named
from tasks.learner import Learner, added, check_fits
from tests.task_jobs import TABLES, job_of
from tests.test_backbones import tiny_bert
from tests.test_simulation import unwatched

METHODS = ("head", "last-k", "lora", "full")
REFUSED = {
    ("image-text", "last-k"): "no last block of both",
    ("forecasting", "lora"): "no linear layer",
    ("forecasting", "last-k"): "no blocks",
}


@pytest.fixture
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    task, method = request.param
    return ready(job_of(task, method), tmp_path)


def ready(job: Job, folder: Path) -> Job:
    """The job with the text encoder that it needs beside its own."""
    if job.task.name != "image-text":
        return job
    folder = folder / "bert"
    options = {"text": str(folder if folder.exists() else tiny_bert(folder))}
    return job.model_copy(update={"backbone": job.backbone.model_copy(update={"options": options})})


ALL = [(task, method) for task in TABLES for method in METHODS]
WORKING = [pair for pair in ALL if pair not in REFUSED]


@pytest.mark.slow
@pytest.mark.parametrize("job", WORKING, indirect=True, ids=lambda pair: "-".join(pair))
def test_each_way_of_tuning_has_the_same_bits_in_one_process_and_in_two(job: Job, tmp_path: Path) -> None:
    result = simulate(job, tmp_path / "one", watch=unwatched)
    other = simulate(job, tmp_path / "two", engine="loop", watch=unwatched)
    assert result["model_sha256"] == other["model_sha256"]
    if not TASKS[job.task.name].on_features:
        pooled = simulate(job, tmp_path / "pool", workers=2, watch=unwatched)
        assert pooled["model_sha256"] == result["model_sha256"]
    losses = [line["loss"] for line in result["rounds"]]
    assert losses[-1] < losses[0], losses
    headline = TASKS[job.task.name].headline
    assert all(headline in values for values in result["final"]["clients"].values())


@pytest.mark.parametrize("job", list(REFUSED), indirect=True, ids=lambda pair: "-".join(pair))
def test_a_way_of_tuning_that_a_task_has_not_is_refused_by_name(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[job.task.name, job.tune.method]):
        simulate(job, tmp_path / "out", watch=unwatched)


@pytest.mark.parametrize("task", TABLES)
def test_shards_read_back_as_they_were_written(task: str, tmp_path: Path) -> None:
    job = ready(job_of(task, "head"), tmp_path)
    names = write_shards(job, tmp_path / "shards")
    population, kind = Population.of(job), task_named(task)
    for name in names:
        rows = population.dataset(job, name)
        again = kind.read(tmp_path / "shards" / name, job.data, job.task.options).train
        assert sorted(kind.keys(rows)) == sorted(kind.keys(again))


@pytest.mark.parametrize("task", TABLES)
def test_metrics_of_two_clients_add_up_to_those_of_all_data(task: str, tmp_path: Path) -> None:
    job = ready(job_of(task, "head"), tmp_path)
    population = Population.of(job)
    kind = task_named(task)
    facts = kind.agree([kind.describe(population.train, job.data, job.task.options)])
    learner = Learner.of(job, kind, facts)
    shards = [learner.task.shard(population.dataset(job, name), facts) for name in population.names(job)]
    whole, tensors = population.whole(learner), learner.initial()
    apart = learner.compute(added(learner.evaluate(tensors, shard) for shard in shards))
    together = learner.compute(learner.evaluate(tensors, whole))
    assert apart.keys() == together.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize("task", TABLES)
def test_an_examples_prediction_depends_on_no_other_example(task: str, tmp_path: Path) -> None:
    job = ready(job_of(task, "head"), tmp_path)
    population = Population.of(job)
    kind = task_named(task)
    facts = kind.agree([kind.describe(population.train, job.data, job.task.options)])
    learner = Learner.of(job, kind, facts)
    shard, tensors = population.whole(learner).select(range(4)), learner.initial()
    together = learner.predictions(tensors, [shard.inputs[row] for row in range(4)])
    for row in range(4):
        alone = learner.predictions(tensors, [shard.inputs[row]])
        assert as_tensor(alone[0]).allclose(as_tensor(together[row]), atol=1e-4, equal_nan=True)


def as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


@pytest.mark.parametrize("task", [task for task in TABLES if not TASKS[task].on_features])
def test_each_example_has_its_own_gradient_as_if_it_were_alone(task: str, tmp_path: Path) -> None:
    """What example-level privacy clips: against autograd on batches of one."""
    job = ready(job_of(task, "full", privacy=PRIVATE), tmp_path)
    population, kind = Population.of(job), task_named(task)
    facts = kind.agree([kind.describe(population.train, job.data, job.task.options)])
    learner = Learner.of(job, kind, facts)
    rows = list(range(4))
    shard = population.whole(learner).select(rows)
    batch, targets = learner.batch(shard, rows), shard.targets_of(rows)
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
            assert torch.allclose(found.get(name, torch.zeros(4, *p.shape))[row], expected, atol=1e-5), name


PRIVATE = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.2, "seeded_noise": True,
}  # fmt: skip


@pytest.mark.parametrize("task", [task for task in TABLES if not TASKS[task].on_features])
def test_each_task_trains_under_example_level_privacy(task: str, tmp_path: Path) -> None:
    train = {"lr": 0.01, "optimizer": "sgd"}
    result = simulate(
        ready(job_of(task, "full", privacy=PRIVATE, train=train), tmp_path), tmp_path / "out", watch=unwatched
    )
    assert result["privacy"]["unit"] == "example" and result["privacy"]["epsilon"] > 0


@pytest.mark.parametrize("task", TABLES)
def test_unknown_options_and_columns_are_one_line_that_names_them(task: str, tmp_path: Path) -> None:
    job = ready(job_of(task, "head"), tmp_path)
    odd = job.model_copy(update={"task": job.task.model_copy(update={"options": {"histroy": 3}})})
    with pytest.raises(ConfigError, match=r"task\.options.*histroy"):
        check_fits(odd, task_named(task))
