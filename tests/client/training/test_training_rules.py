"""Schedules, clipping, RMSprop and rates by layer: torch's own optimizers and schedulers as the oracle."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.state.scaffold import ScaffoldClient
from atoll.client.training.batches import batches
from atoll.client.training.learning_rates import layer_rates
from atoll.client.training.local_sgd import train_model
from atoll.client.training.vmap import vmap_training
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.train import TrainSection, lr_of_round
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.privacy.noise import seeded
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.secure_aggregation import scale_of_sum
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.client.heads.test_heads import Own, head, job, module, named, train_heads, work
from tests.sim.engines.test_at_once import relative
from tests.sim.test_simulation import Breaks, run
from tests.strategies.test_strategy_runs import of_pixels
from tests.support.small import grey_png_shard, image_job

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}  # fmt: skip
OF_TORCH = ("momentum", "weight_decay")


def scheduler_of(optimizer: torch.optim.Optimizer, train: TrainSection, count: int) -> Any:
    """Torch's own scheduler for so many rounds, or steps, with a linear warm-up before it."""
    schedulers = torch.optim.lr_scheduler
    warmup = train.lr_warmup or 0
    after: Any = {
        "constant": lambda: schedulers.ConstantLR(optimizer, factor=1.0),
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, T_max=count - warmup),
        "step": lambda: schedulers.StepLR(optimizer, train.lr_step or 1, train.lr_decay or 0.1),
    }[train.lr_schedule or "constant"]()
    if not warmup:
        return after
    before = schedulers.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warmup))
    return schedulers.SequentialLR(optimizer, [before, after], [warmup])


def torchs_rates(train: TrainSection, count: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.lr)
    scheduler, found = scheduler_of(optimizer, train, count), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def by_torch(start: Tensors, item: Own, setting: Job, mu: float = 0.0) -> Tensors:
    """One client's head: torch's layers, optimizer, scheduler over steps and clipping, in float64."""
    train, model = setting.train, module(start)
    given = {key: getattr(train, key) for key in OF_TORCH if getattr(train, key)}
    optimizer = OPTIMIZERS[train.optimizer](model.parameters(), lr=train.lr, **given)
    order = batches(len(item.targets), setting, 3, item.client)
    scheduler = scheduler_of(optimizer, train, len(order))
    for rows in order:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(item.features[rows].double()), item.targets[rows])
        for name, p in named(start, model).items():
            loss = loss + mu / 2 * (p - start[name]).square().sum()
        loss.backward()
        if train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        scheduler.step()
    return {name: p.detach() - start[name] for name, p in named(start, model).items()}


BY_STEP = {"lr_schedule": "cosine", "lr_schedule_over": "steps"}
WAYS: list[dict[str, Any]] = [
    {"lr": 0.01, "optimizer": "rmsprop", "epochs": 2},
    {"lr": 0.01, "optimizer": "rmsprop", "weight_decay": 0.1},
    {"lr": 0.5, "clip_norm": 0.1},
    {"lr": 0.5, "clip_norm": 0.1, "momentum": 0.9, "epochs": 2},
    {"lr": 0.01, "clip_norm": 0.1, "optimizer": "adamw", "weight_decay": 0.1},
    {"lr": 0.3, "epochs": 3, **BY_STEP},
    {"lr": 0.3, "epochs": 3, "momentum": 0.9, "weight_decay": 0.01, "lr_warmup": 2, **BY_STEP},
    {"lr": 0.03, "epochs": 3, "optimizer": "adamw", "weight_decay": 0.1, **BY_STEP},
    {"lr": 0.3, "epochs": 3, **BY_STEP, "lr_schedule": "step", "lr_step": 2, "lr_decay": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("mu", [0.0, 0.5], ids=["plain", "proximal"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_heads_learn_what_torch_makes_of_the_same_rules(way: dict[str, Any], mu: float) -> None:
    start, setting = head(13, 4, 5), job(**{"batch_size": 8} | way)
    items = [work(f"c{i}", count, 13, 4, i) for i, count in enumerate([3, 8, 20, 40])]
    updates = train_heads(start, items, setting, 3, {"proximal_mu": mu})
    for item, update in zip(items, updates, strict=True):
        for name, delta in by_torch(start, item, setting, mu).items():
            torch.testing.assert_close(update.delta[name].double(), delta, rtol=5e-4, atol=5e-6)


@pytest.mark.parametrize("way", WAYS[2:8], ids=str)
def test_a_clients_bits_do_not_depend_on_who_trains_beside_it(way: dict[str, Any]) -> None:
    start, setting = head(37, 4, 21), job(**{"batch_size": 8} | way)
    items = [work(f"c{i}", 3 + 7 * i % 29, 37, 4, i) for i in range(23)]
    together = train_heads(start, items, setting, 3, {})
    for item, update in zip(items, together, strict=True):
        [alone] = train_heads(start, [item], setting, 3, {})
        assert all(torch.equal(alone.delta[name], delta) for name, delta in update.delta.items())


SCHEDULES: list[dict[str, Any]] = [
    {"lr_schedule": "cosine"},
    {"lr_schedule": "cosine", "lr_warmup": 3},
    {"lr_schedule": "step", "lr_step": 2, "lr_decay": 0.5, "lr_warmup": 2},
    {"lr_schedule": "constant", "lr_warmup": 4},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_rate_of_a_round_is_torchs(schedule: dict[str, Any]) -> None:
    train = TrainSection(lr=0.7, **schedule)
    rates = [lr_of_round(train, round, 9) for round in range(1, 10)]
    assert rates == pytest.approx(torchs_rates(train, 9), rel=1e-12)
    assert lr_of_round(train, 0, 9) == 0.7 and lr_of_round(train, 10, 9) == rates[-1]


def test_a_round_of_a_schedule_is_a_round_at_that_rate() -> None:
    start, item = head(13, 4), work("c", 20, 13, 4, 1)
    rounds = 20  # a job's default
    for round in (1, 5, 20):
        rate = 0.5 * (1 + math.cos(math.pi * (round - 1) / rounds)) / 2
        scheduled, plain = (job(batch_size=8, **way) for way in
                            ({"lr": 0.5, "lr_schedule": "cosine"}, {"lr": rate}))  # fmt: skip
        [found], [wanted] = (train_heads(start, [item], one, round, {}) for one in (scheduled, plain))
        for name, delta in wanted.delta.items():
            torch.testing.assert_close(found.delta[name], delta, rtol=1e-6, atol=0)


def test_private_heads_and_sums_take_the_rounds_rate() -> None:
    def bits(client: str) -> Any:
        return seeded(stream_seed(5, "noise", client))

    start, item = head(13, 4), work("c", 9, 13, 4, 1)
    deltas = []
    for round in (1, 11):
        how = {"lr": 0.5, "batch_size": 9, "lr_schedule": "cosine"}
        [update] = train_heads(start, [item], job(**how), round, {}, per_example=DpSgd(0.3, 0.0, 20.0, bits))
        deltas.append(update.delta["head.weight"])
    torch.testing.assert_close(deltas[1], deltas[0] / 2)
    privacy = {"unit": "example", "where": "distributed", "noise_multiplier": 1.0, "delta": 1e-3,
               "sampling_rate": 0.5}  # fmt: skip
    setting = of_pixels({"clients": 4, "cohort": 4, "rounds": 20}, privacy=privacy,
                        train={"lr": 0.5, "lr_schedule": "cosine"})  # fmt: skip
    assert scale_of_sum(setting, 11) == pytest.approx(scale_of_sum(setting, 1) / 2)


def test_scaffold_divides_by_the_rounds_rate() -> None:
    train = TrainSection(lr=0.5, lr_schedule="cosine", batch_size=4)
    update = Update("c", 3, {"w": torch.tensor([-0.3])}, 8)
    kept, _ = ScaffoldClient(train, 2, rounds=4).after(
        update, {"w": torch.zeros(1)}, {"w": torch.zeros(1)}, {}
    )
    assert kept["w"].item() == pytest.approx(0.3 / (2 * 0.25))


def learner_of(setting: Job) -> Learner:
    return Learner.of(setting, task_named(setting.task.name), {"classes": ["a", "b", "c"]})


def moves_by_torch(learner: Learner, start: Tensors, shard: Any, rates: dict[str, float]) -> Tensors:
    """The whole model trained by torch, with a group of its own for every parameter."""
    setting, model = learner.job, learner.model
    train = setting.train
    trainable.load_values(model, start)
    trainable.training_mode(model)
    parameters = trainable.trainable(model)
    given = {key: getattr(train, key) for key in OF_TORCH if getattr(train, key)}
    groups = [{"params": [p], "lr": train.lr * rates.get(name, 1.0)} for name, p in parameters.items()]
    optimizer = OPTIMIZERS[train.optimizer](groups, lr=train.lr, **given)
    order = batches(len(shard), setting, 1, "c")
    scheduler = scheduler_of(optimizer, train, len(order))
    for rows in order:
        optimizer.zero_grad()
        learner.task.loss(model(learner.collate(shard, rows)), shard.targets_of(rows)).backward()  # type: ignore[no-untyped-call]
        if train.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), train.clip_norm)
        optimizer.step()
        scheduler.step()
    return {name: p.detach() - start[name] for name, p in parameters.items()}


MODEL_WAYS: list[dict[str, Any]] = [
    {"lr": 0.001, "optimizer": "rmsprop"},
    {"lr": 0.05, "clip_norm": 0.2, "momentum": 0.9},
    {"lr": 0.05, "layer_decay": 0.5, "lr_warmup": 2, "epochs": 2, **BY_STEP},
]


def small_model(way: dict[str, Any]) -> Learner:
    return learner_of(image_job("squeezenet1_1", tune={"method": "last-k", "layers": 2},
                                train={"batch_size": 5, "dropout": 0.0} | way))  # fmt: skip


@pytest.mark.parametrize("way", MODEL_WAYS, ids=str)
def test_a_whole_model_learns_what_torch_makes_of_the_same_rules(way: dict[str, Any]) -> None:
    learner = small_model(way)
    start, shard = learner.initial(), grey_png_shard(12, classes=3)
    update = train_model(learner, start, shard, learner.job, client="c", round=1, plan={})
    rates = layer_rates(learner.model, learner.job.train)
    wanted = moves_by_torch(learner, start, shard, rates)
    for name, delta in wanted.items():
        assert relative(update.delta[name], delta) < 1e-5
    together = vmap_training(learner, start, {"c": shard, "d": grey_png_shard(7, classes=3)}, learner.job,
                             round=1, plan={})  # fmt: skip
    [found] = [one for one in together if one.client == "c"]
    apart = (
        0.05 if way.get("optimizer") else 1e-4
    )  # RMSprop's first steps are of one size, whatever the gradient
    for name, delta in wanted.items():
        assert relative(found.delta[name], delta) < apart


def test_each_lower_block_takes_a_part_of_the_rate_above() -> None:
    learner = learner_of(image_job("squeezenet1_1", tune={"method": "full"}, train={"layer_decay": 0.5}))
    rates = layer_rates(learner.model, learner.job.train)
    of_block: dict[str, float] = {}
    for name, rate in rates.items():
        of_block.setdefault(".".join(name.split(".")[:4]) if "features" in name else "head", rate)
        assert of_block[".".join(name.split(".")[:4]) if "features" in name else "head"] == rate
    assert of_block.pop("head") == 1.0
    places = sorted(of_block, key=lambda name: int(name.split(".")[3]))
    assert [of_block[place] for place in places] == [0.5 ** (len(places) - i) for i in range(len(places))]


def refused(**tables: Any) -> Job:
    table = {"name": "t", "seed": 5, "task": {"name": "text-classification"}, "data": {"source": "x"},
             "backbone": {"name": "hf:x"}}  # fmt: skip
    return Job.parse(table | tables, origin="job")


EXAMPLE = {"unit": "example", "noise_multiplier": 1.0, "delta": 1e-3, "sampling_rate": 0.1}


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train": {"lr_step": 2}}, "lr_step has no meaning without lr_schedule = 'step'"),
        ({"train": {"lr_schedule": "step"}}, "'step' needs lr_step, the rounds between two steps"),
        ({"train": {"lr_schedule": "step", "lr_schedule_over": "steps"}}, "needs lr_step, the steps between"),
        ({"train": {"lr_schedule_over": "steps"}}, "lr_schedule_over has no meaning without lr_schedule"),
        ({"train": {"lr_schedule": "cosine", "lr_warmup": 20}}, "train.lr_warmup: expected less than"),
        ({"train": {"layer_decay": 0.5}}, "train.layer_decay has no meaning with tune.method = 'head'"),
        ({"train": {"lr_schedule": "cosine"}, "privacy": EXAMPLE | {"audit": True}}, "lr_schedule exclude"),
        ({"train": {"clip_norm": 1.0}, "privacy": EXAMPLE}, "train.clip_norm: under example-level privacy"),
        ({"train": {"optimizer": "rmsprop"}, "strategy": {"name": "scaffold"}}, "train.optimizer: scaffold"),
        ({"train": {"clip_norm": 1.0}, "strategy": {"name": "scaffold"}}, "train.clip_norm: scaffold"),
        ({"train": dict(BY_STEP), "strategy": {"name": "scaffold"}}, "train.lr_schedule_over: scaffold"),
        ({"train": dict(BY_STEP), "strategy": {"name": "fednova"}}, "train.lr_schedule_over: fednova"),
        ({"train": {"layer_decay": 0.5}, "tune": {"method": "full"}, "strategy": {"name": "scaffold"}},
         "train.layer_decay: scaffold"),
        ({"train": dict(BY_STEP), "privacy": EXAMPLE | {"where": "distributed"}}, "the server makes the"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        refused(**tables)


def test_a_resumed_run_goes_on_at_the_rate_of_its_round(tmp_path: Path) -> None:
    setting = of_pixels({"clients": 6, "cohort": 4, "rounds": 4},
                        train={"lr": 0.5, "lr_schedule": "cosine", "clip_norm": 0.2})  # fmt: skip
    whole = run(setting, tmp_path / "whole").model_sha256
    population = Population.of(setting)
    with pytest.raises(KeyboardInterrupt):
        run_job(setting, Breaks.of(population), tmp_path / "r", cached_test_set(population, None))
    assert run(setting, tmp_path / "r", resume=True).model_sha256 == whole
