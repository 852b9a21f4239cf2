"""Clients trained at once by torch.func: what one after the other gives, but for rounding."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.client.training.local_sgd import train_model
from atoll.client.training.vmap import vmap_training
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import execution_mode, simulate
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.backbones.test_backbones import tiny_bert
from tests.support.small import grey_png_shard, image_job


def text_job(folder: Path, **tables: Any) -> Job:
    """LoRA on a small BERT that drops nothing out, on texts of many lengths."""
    path = tiny_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with (folder / "texts.csv").open("w", newline="") as file:
        words = ["good", "bad", "a b", "x"]
        rows = [(" ".join(words[(i + j) % 4] for j in range(1 + i % 9)), "ab"[i % 2]) for i in range(120)]
        csv.writer(file).writerows([("text", "label"), *rows])
    table = {
        "name": "texts", "seed": 3, "task": {"name": "text-classification"},
        "data": {"source": str(folder / "texts.csv")},
        "backbone": {"name": str(path), "max_tokens": 16},
        "tune": {"method": "lora", "rank": 2}, "train": {"lr": 0.05, "batch_size": 4},
        "federation": {"clients": 9, "cohort": 7, "rounds": 2},
    }  # fmt: skip
    return Job.parse(table | tables, origin="test")


CLIENTS = ("client-0000", "client-0003", "client-0007")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("tune", "optimizer"),
    [
        ({"method": "lora", "rank": 2}, {}),
        ({"method": "lora", "rank": 2}, {"momentum": 0.9, "weight_decay": 0.01}),
        ({"method": "last-k", "layers": 1}, {"momentum": 0.9}),
        ({"method": "full"}, {}),
    ],
    ids=str,
)
def test_updates_are_those_of_one_client_after_the_other_to_1e5(
    tmp_path: Path, tune: dict[str, Any], optimizer: dict[str, Any]
) -> None:
    train = {"lr": 0.05, "batch_size": 5, "epochs": 2} | optimizer
    job = text_job(tmp_path, tune=tune, train=train)
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b"]})
    start = learner.initial()
    population = Population.of(job)
    shards = {name: learner.task.shard(population.dataset(job, name), learner.data_info) for name in CLIENTS}
    plan = {"proximal_mu": 0.1}
    together = vmap_training(learner, start, shards, job, round=1, plan=plan)
    for update, (name, shard) in zip(together, shards.items(), strict=True):
        alone = train_model(learner, start, shard, job, client=name, round=1, plan=plan)
        assert (update.client, update.num_examples) == (alone.client, alone.num_examples)
        moved = torch.cat([alone.delta[n].flatten() for n in sorted(start)])
        found = torch.cat([update.delta[n].flatten() for n in sorted(start)])
        assert float(moved.norm()) > 0
        assert relative(found, moved) < 1e-5
        assert float(update.states["train_loss.sum"]) == pytest.approx(
            float(alone.states["train_loss.sum"]), rel=1e-5
        )


def test_texts_of_many_lengths_train_at_once_as_one_by_one(tmp_path: Path) -> None:
    job = text_job(tmp_path)
    runs = {
        engine: simulate(job, tmp_path / engine, engine=engine, on_event=ignore_events, report=False)
        for engine in ("inline", "cohort")
    }
    assert runs["cohort"].engine == "cohort"
    for alone, together in zip(runs["inline"].rounds, runs["cohort"].rounds, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_cohort_at_once_is_never_taken_unless_asked_for() -> None:
    job = image_job("mobilenet_v2", tune={"method": "full"})
    assert "one client after the other" in execution_mode(job, "inline", 1)
    assert "other bits" in execution_mode(job, "cohort", 1)


def test_more_clients_than_fit_at_once_all_train() -> None:
    job = image_job("squeezenet1_1", tune={"method": "last-k", "layers": 1}, train={"batch_size": 4})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b"]})
    shards: dict[str, Shard] = {f"c{i:02d}": grey_png_shard(4 + i % 3, classes=2, seed=i) for i in range(19)}
    together = vmap_training(learner, learner.initial(), shards, job, round=1, plan={})
    assert together.clients == tuple(shards)
    assert together.num_examples == tuple(len(shard) for shard in shards.values())
    assert all(bool(t.flatten(1).norm(dim=1).min() > 0) for t in together.delta.values())


def test_augmented_batches_are_varied_as_those_of_one_client_after_the_other() -> None:
    job = image_job("squeezenet1_1", train={"augment": ["crop", "flip"], "batch_size": 3, "lr": 0.1})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b"]})
    start = learner.initial()
    shards = {f"c{i}": grey_png_shard(count, classes=2, seed=i) for i, count in enumerate([3, 7])}
    together = vmap_training(learner, start, shards, job, round=1, plan={})
    for update, (name, shard) in zip(together, shards.items(), strict=True):
        alone = train_model(learner, start, shard, job, client=name, round=1, plan={})
        for n in start:
            assert relative(update.delta[n], alone.delta[n]) < 1e-4
