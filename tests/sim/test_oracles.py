"""Whole runs against software that isn't ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import cached_test_set, simulate
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.support.small import grey_png_shard, image_job


@pytest.mark.slow
@pytest.mark.processes
def test_a_federated_head_reaches_scikit_learns_logistic_regression_on_the_same_features(
    tmp_path: Path,
) -> None:
    """The settings of README's job for images, MNIST, ten clients that are alike."""
    job = Job.parse(
        {
            "name": "oracle",
            "seed": 3,
            "task": {"name": "image-classification"},
            "data": {"source": "mnist-5k", "validation_fraction": 0.0},
            "backbone": {"name": "torchvision:mobilenet_v2", "image_size": 64},
            "train": {"epochs": 5, "batch_size": 32, "optimizer": "adam", "lr": 0.003},
            "federation": {"clients": 10, "rounds": 50},
            "evaluate": {"every": 50},
        },
        origin="test",
    )
    population = Population.of(job)
    task = task_named(job.task.name)
    learner = Learner.of(job, task, task.local_info(population.train, job.data, {}))
    test = cached_test_set(population, None)(learner)
    assert test is not None
    train = task.shard(population.train, learner.data_info)
    oracle = LogisticRegression(max_iter=3000).fit(
        learner.features.plain(train).numpy(), train.targets.numpy()
    )
    expected = oracle.score(learner.features.plain(test).numpy(), test.targets.numpy())
    found = simulate(job, tmp_path / "r", on_event=ignore_events, report=False).final["server"]["accuracy"]
    assert found >= expected - 0.01


def test_one_client_with_every_example_in_one_batch_is_gradient_descent() -> None:
    """One client, one full batch a round, FedAvg: the model moves by minus lr times the gradient."""
    from atoll.client.heads.feature_table import ClientRows, FeatureTable
    from atoll.client.heads.layers import LOSSES
    from atoll.client.heads.train import HeadTrainingConfig, train_heads
    from atoll.strategies.fedavg import FedAvg

    job = image_job("squeezenet1_1", train={"lr": 0.5, "batch_size": 64})
    g = torch.Generator().manual_seed(0)
    features, targets = torch.randn(40, 6, generator=g), torch.randint(3, (40,), generator=g)
    model = {"head.weight": torch.zeros(3, 6), "head.bias": torch.zeros(3)}
    layer = torch.nn.Linear(6, 3)
    layer.load_state_dict({"weight": torch.zeros(3, 6), "bias": torch.zeros(3)})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for round in range(1, 21):
        work = [ClientRows("c", np.arange(40))]
        updates = train_heads(
            model, FeatureTable.of(features, targets), work, HeadTrainingConfig(job, LOSSES["softmax"], round)
        )
        model, _ = FedAvg().merge(model, updates, {})
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(features), targets).backward()
        optimizer.step()
    torch.testing.assert_close(model["head.weight"], layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model["head.bias"], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_merged_metrics_are_those_of_all_examples_together() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    from atoll.learning.learner import sum_states

    job = image_job("squeezenet1_1")
    task = task_named(job.task.name)
    learner = Learner.of(job, task, {"classes": ["a", "b", "c"]})
    tensors = learner.initial()
    parts = [grey_png_shard(n, classes=3, seed=n) for n in (3, 10, 25)]
    merged = learner.compute(sum_states(learner.evaluate(tensors, part) for part in parts))
    truth = torch.cat([part.targets for part in parts])
    said = torch.cat([learner.outputs(tensors, part) for part in parts])
    assert merged["accuracy"] == pytest.approx(accuracy_score(truth, said.argmax(1)), abs=1e-6)
    assert merged["macro_f1"] == pytest.approx(f1_score(truth, said.argmax(1), average="macro"), abs=1e-6)
    assert merged["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(said.double(), truth)), rel=1e-6
    )
