"""`train.steps`: a round counts local steps, and a small shard is gone through again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.training.batches import batches
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.train import TrainSection
from atoll.server.events import ignore_events
from atoll.sim.baselines import centralized_job
from atoll.sim.engines.engine import simulate

SIZES = {"a": 5, "b": 17, "c": 33}


def job_of(**train: Any) -> Job:
    return Job.parse(
        {
            "name": "steps",
            "seed": 3,
            "task": {"name": "image-classification"},
            "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.3}},
            "backbone": {"name": "raw:pixels", "image_size": 8},
            "federation": {"clients": 4, "rounds": 2},
            "train": {"batch_size": 8, "lr": 0.2} | train,
        },
        origin="test",
    )


@pytest.mark.parametrize("count", SIZES.values())
def test_steps_are_the_first_of_as_many_epochs_as_they_need(count: int) -> None:
    found = batches(count, job_of(steps=7), 2, "a")
    assert len(found) == 7
    assert found == batches(count, job_of(epochs=7), 2, "a")[:7]
    assert sum(map(len, found)) == job_of(steps=7).train.examples_seen(count)


@pytest.mark.parametrize("count", SIZES.values())
def test_steps_of_whole_epochs_are_those_epochs(count: int) -> None:
    whole = 3 * -(-count // 8)
    assert batches(count, job_of(steps=whole), 1, "b") == batches(count, job_of(epochs=3), 1, "b")
    assert TrainSection(batch_size=8, steps=whole).epochs_begun(count) == 3


def test_heads_that_train_at_once_take_the_steps_of_a_loop_over_batches() -> None:
    """Against SGD written out, in float64, on the batches of each client."""
    job, generator = job_of(steps=7), torch.Generator().manual_seed(1)
    features = torch.randn(60, 4, generator=generator)
    targets = torch.randint(3, (60,), generator=generator)
    head = {"head.weight": torch.randn(3, 4, generator=generator), "head.bias": torch.zeros(3)}
    starts = np.cumsum([0, *SIZES.values()])
    work = [
        ClientRows(name, np.arange(start, start + count))
        for start, (name, count) in zip(starts[:-1], SIZES.items(), strict=True)
    ]
    table = FeatureTable.of(features.unsqueeze(0), targets, "cpu")
    updates = train_heads(head, table, work, HeadTrainingConfig(job, LOSSES["softmax"], 1))
    for update, own in zip(updates, work, strict=True):
        w = {name: tensor.double().clone().requires_grad_() for name, tensor in head.items()}
        seen = 0
        for rows in batches(len(own.rows), job, 1, own.client):
            places = own.rows[rows]
            outputs = features[places].double() @ w["head.weight"].T + w["head.bias"]
            loss = torch.nn.functional.cross_entropy(outputs, targets[places])
            grads = torch.autograd.grad(loss, list(w.values()))
            w = {
                n: (t - 0.2 * g).detach().requires_grad_() for (n, t), g in zip(w.items(), grads, strict=True)
            }
            seen += len(rows)
        for name, tensor in w.items():
            moved = tensor.detach() - head[name].double()
            torch.testing.assert_close(update.delta[name].double(), moved, atol=1e-5, rtol=1e-5)
        assert float(update.states["train_loss.count"]) == seen


def test_every_engine_takes_the_same_steps(tmp_path: Path) -> None:
    job = job_of(steps=5)
    whole, looped = (
        simulate(job, tmp_path / engine, engine=engine, on_event=ignore_events, report=False)
        for engine in ("inline", "loop")
    )
    assert whole.model_sha256 == looped.model_sha256
    other = simulate(job_of(steps=6), tmp_path / "six", on_event=ignore_events, report=False)
    assert other.model_sha256 != whole.model_sha256


def test_baselines_take_as_many_steps_as_the_clients_together() -> None:
    job = job_of(steps=5)
    assert centralized_job(job).train.steps == 2 * 5
    assert centralized_job(job, 4).train.steps == 4 * 2 * 5


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train": {"steps": 5, "epochs": 2}}, r"train\.steps and epochs exclude each other, for one says"),
        (
            {
                "train": {"steps": 5},
                "privacy": {
                    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.1,
                },
            },
            r"train\.steps: under example-level privacy privacy\.steps",
        ),
    ],
)  # fmt: skip
def test_steps_that_say_nothing_are_refused(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Job.parse({"name": "x", "seed": 1, "task": {"name": "image-classification"},
                   "data": {"source": "digits"}, "backbone": {"name": "raw:pixels", "image_size": 8},
                   "federation": {"clients": 2, "rounds": 1}} | tables, origin="test")  # fmt: skip
