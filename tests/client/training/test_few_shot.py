"""Few examples a class, a model to adapt from, and what a few local steps make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.site import Site
from atoll.client.training.local_adaptation import adapt_locally
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.learning.split import split_shard
from atoll.protocol.messages import Update
from atoll.protocol.requests import EvaluateRequest
from atoll.protocol.stacked_updates import stacked
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.population import Population
from atoll.strategies.meta.reptile import Reptile
from atoll.tasks import task_named
from tests.sim.test_simulation import job, run
from tests.support.small import grey_png_shard, image_job
from tests.support.task_data import ready
from tests.support.task_jobs import job_of


def learner_of(setting: Job) -> tuple[Learner, Population]:
    population = Population.of(setting)
    data_info = population.roster(setting).data_info[0]
    return Learner.of(setting, task_named(setting.task.name), data_info), population


def test_reptile_goes_part_of_the_way_to_the_even_mean_whatever_clients_hold() -> None:
    model = {"w": torch.tensor([10.0])}
    updates = [Update(c, 1, {"w": torch.tensor([d])}, n) for c, d, n in (("a", 1.0, 1), ("b", 5.0, 99))]
    for given in (updates, stacked(updates)):
        merged, state = Reptile(lr=0.25).merge(model, given, {})
        assert merged["w"].tolist() == [10.75] and state == {}  # 10 + 0.25 * (1 + 5) / 2


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_an_adapted_head_is_the_one_of_torchs_loop_stopped_after_as_many_steps(steps: int) -> None:
    learner, population = learner_of(job())
    index = PopulationIndex(population, learner)
    [(train, _)] = index.splits([1])
    shard, head = index.full_population.select(train.tolist()), learner.initial()
    request = EvaluateRequest(learner.job.canonical, learner.job.hash, 4, learner.data_info, head)
    found = adapt_locally(learner, request, "client-0001", shard, steps)
    from atoll.client.training.batches import batches

    longer = learner.job.model_copy(update={"train": learner.job.train.model_copy(update={"epochs": 9})})
    weight, bias = (head[f"head.{name}"].clone().requires_grad_() for name in ("weight", "bias"))
    optimizer = torch.optim.SGD([weight, bias], lr=learner.job.train.lr)
    x = learner.features.plain(shard)
    taken = batches(len(shard), longer, 5, "client-0001")[:steps]
    assert len(taken) == steps
    for rows in taken:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(x[rows] @ weight.T + bias, shard.table[rows]).backward()
        optimizer.step()
    assert torch.allclose(found["head.weight"], weight, atol=1e-5)
    assert torch.allclose(found["head.bias"], bias, atol=1e-5)


def test_an_adapted_network_took_as_many_steps_by_autograd() -> None:
    setting = image_job("squeezenet1_1", tune={"method": "full"}, train={"lr": 0.001, "batch_size": 4})
    data_info = {"classes": ["a", "b"]}
    learner = Learner.of(setting, task_named(setting.task.name), data_info)
    shard, first = grey_png_shard(8, classes=2), learner.initial()
    request = EvaluateRequest(setting.canonical, setting.hash, 1, data_info, first)
    two = adapt_locally(learner, request, "c", shard, 2)
    from atoll.client.training.local_sgd import train_model

    epoch = train_model(learner, first, shard, setting, client="c", round=2, plan={})  # of 8 / 4 steps
    assert all(torch.equal(two[n], first[n] + d) for n, d in epoch.delta.items())
    one = adapt_locally(learner, request, "c", shard, 1)
    assert not all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("options", [{"engine": "loop"}, {"workers": 3}], ids=str)
def test_adapted_metrics_stand_beside_the_plain_ones_the_same_everywhere(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    data = {"partition": {"kind": "pathological", "classes_per_client": 2}, "classes": tuple("0123456789")}
    tables: dict[str, Any] = {"data": data, "strategy": {"name": "reptile"}, "evaluate": {"adapt": 20}}
    federation = {"clients": 10, "cohort": 10, "rounds": 5}
    setting = job(**tables, federation=federation)
    result, other = run(setting, tmp_path / "a"), run(setting, tmp_path / "b", **options)
    assert result.model_sha256 == other.model_sha256
    assert result.final["clients"] == other.final["clients"]
    clients = result.final["clients"].values()
    plain, after = (np.mean([c[m] for c in clients]) for m in ("accuracy", "adapted_accuracy"))
    assert after > plain + 0.2
    [note] = [n for n in result.notes if "after 20 local steps" in n]
    assert f"{after * 100:.1f} %" in note and f"{plain * 100:.1f} %" in note
    without = run(setting.model_copy(update={"evaluate": job().evaluate}), tmp_path / "c")
    assert without.model_sha256 == result.model_sha256 and not without.notes


@pytest.mark.parametrize("shots", [1, 3])
def test_a_client_trains_on_so_many_examples_a_class_the_same_ones_wherever_it_is(shots: int) -> None:
    learner, population = learner_of(job(data={"shots": shots}))
    whole, _ = learner_of(job())
    index, site = PopulationIndex(population, learner), Site(population)
    for number, (train, kept) in enumerate(index.splits(range(6))):
        dataset = population.dataset(learner.job, f"client-{number:04d}")
        shard = learner.task.shard(dataset, learner.data_info)
        mine, back = split_shard(learner.job, learner.task, shard)
        here = index.full_population.select(train.tolist())
        assert mine.keys == here.keys and back.keys == index.full_population.select(kept.tolist()).keys
        everything = split_shard(whole.job, whole.task, shard)
        assert back.keys == everything[1].keys  # what is measured on stays
        had, has = (np.bincount(s.table.numpy(), minlength=10) for s in (everything[0], mine))
        assert np.array_equal(has, np.minimum(had, shots))
    assert site.shards is population


def test_few_shots_have_the_same_bits_in_every_engine(tmp_path: Path) -> None:
    setting = job(data={"shots": 2}, tune={"head_init": "prototype"}, federation={"rounds": 2})
    results = [run(setting, tmp_path / e, engine=e) for e in ("inline", "loop")]
    assert results[0].model_sha256 == results[1].model_sha256


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({"evaluate": {"adapt": 5}, "personal": {"keep": "mixture"}}, "expected none with personal.keep"),
        ({"evaluate": {"adapt": 5}, "data": {"validation_fraction": 0.0}}, "validation_fraction above 0"),
        (
            {"evaluate": {"adapt": 5}, "privacy": {"unit": "client", "epsilon": 1.0, "delta": 1e-4}},
            "evaluate.adapt: .* expected none with privacy.unit = 'client'",
        ),
    ],
)
def test_where_nobody_could_adapt_it_is_refused_by_name(tables: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        job(**tables)


def test_shots_are_refused_where_examples_are_promised_privacy_or_have_no_class(tmp_path: Path) -> None:
    from atoll.server.run.run_job import validate_job

    promise = {"unit": "example", "epsilon": 1.0, "delta": 1e-4, "sampling_rate": 0.1}
    with pytest.raises(ConfigError, match=r"data\.shots: .* expected none with privacy\.unit = 'example'"):
        validate_job(job(data={"shots": 1}, privacy=promise))
    base = ready(job_of("forecasting", "head"), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.shots: forecasting has no examples of one class"):
        validate_job(base.model_copy(update={"data": base.data.model_copy(update={"shots": 1})}))


def test_a_clients_promise_refuses_reptile_whose_mean_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.name: expected one of .*, found 'reptile'"):
        job(strategy={"name": "reptile"}, privacy={"unit": "client", "epsilon": 1.0, "delta": 1e-4})
