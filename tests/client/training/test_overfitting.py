"""Label smoothing, dropout, balanced sampling: against torch, the same bits in every engine, refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from atoll.client.heads.class_imbalance import smoothed
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.training.batches import batches, weighted_sample
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.compatibility import check_fits
from atoll.learning.learner import Learner
from atoll.learning.objective.class_imbalance import Imbalance
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks import task_named
from tests.client.training.test_imbalance import job_of
from tests.support.small import grey_png_shard, image_job


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # as the job's `threads` says, for what is called here without a run


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_closed_form_of_smoothed_labels_is_torchs(share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 8, 5, generator=generator) * 3
    targets = torch.randint(0, 5, (3, 8), generator=generator)
    loss = smoothed(LOSSES["softmax"], job_of(None, train={"label_smoothing": share}))
    error, numbers = loss.grad(outputs.clone(), targets)
    for client in range(3):
        own = outputs[client].clone().requires_grad_()
        value = nn.functional.cross_entropy(own, targets[client], label_smoothing=share)
        (gradient,) = torch.autograd.grad(value * 8, own)
        assert torch.allclose(error[client], gradient, atol=2e-6)
        assert float(loss.value(numbers)[client].mean()) == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("train", [{"label_smoothing": 0.1}, {"imbalance": "sampling"}], ids=str)
def test_a_clients_bits_do_not_depend_on_its_company(train: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(300, 20, generator=generator)
    targets = torch.randint(0, 7, (300,), generator=generator)
    head = {"head.weight": torch.randn(7, 20, generator=generator), "head.bias": torch.zeros(7)}
    ends = np.cumsum([0, 3, 40, 17, 1, 100, 64, 75])
    client_rows = [ClientRows(f"c{i}", np.arange(a, b)) for i, (a, b) in enumerate(pairwise(ends))]
    local = HeadTrainingConfig(
        job_of(None, train={"lr": 0.5, "batch_size": 16} | train), LOSSES["softmax"], round=1
    )
    examples = FeatureTable.of(features, targets)
    together = {update.client: update.delta for update in train_heads(head, examples, client_rows, local)}
    for work in client_rows:
        (alone,) = train_heads(head, examples, [work], local)
        assert all(torch.equal(alone.delta[name], t) for name, t in together[work.client].items())


@pytest.mark.parametrize("train", [{"label_smoothing": 0.2}, {"imbalance": "sampling"}], ids=str)
def test_engines_agree_and_it_makes_a_difference(train: dict[str, Any], tmp_path: Path) -> None:
    changed = job_of(None, train={"lr": 0.5, "batch_size": 16} | train)
    found = [
        simulate(job, tmp_path / name, engine=engine, on_event=ignore_events, report=False).model_sha256
        for name, engine, job in (
            ("inline", "inline", changed),
            ("loop", "loop", changed),
            ("plain", "inline", job_of(None)),
        )
    ]
    assert found[0] == found[1] != found[2]


def test_sampling_draws_every_class_as_often_and_the_share_of_a_draw_is_its_chance() -> None:
    targets = torch.tensor([0] * 90 + [1] * 9 + [2])
    chances = Imbalance("sampling", 1.0).chances(targets)
    assert chances is not None
    # A third for each class: 1/3 of 90, of 9, of 1.
    assert chances[[0, 90, 99]].tolist() == pytest.approx([1 / 270, 1 / 27, 1 / 3])
    drawn = np.concatenate([weighted_sample(chances, np.array([s], dtype=np.uint64)) for s in range(300)])
    shares = np.bincount(targets.numpy()[drawn]) / len(drawn)
    # 30,000 draws: three deviations are 0.008.
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    half = Imbalance("sampling", 0.5).chances(targets)
    assert half is not None
    assert half[0] / half[90] == pytest.approx((9 / 90) ** 0.5)


def test_an_epoch_by_autograd_draws_what_a_head_draws() -> None:
    job = job_of(None, train={"lr": 0.5, "batch_size": 16, "imbalance": "sampling"})
    targets = torch.tensor([0] * 30 + [1] * 3)
    imbalance = Imbalance.of(job)
    assert imbalance is not None
    found = batches(33, job, 1, "a", imbalance.chances(targets))
    assert [len(batch) for batch in found] == [16, 16, 1]
    rows = [row for batch in found for row in batch]
    assert len(set(rows)) < 33 and 8 < sum(row >= 30 for row in rows) < 25
    again = batches(33, job, 1, "a", imbalance.chances(targets))
    assert found == again != batches(33, job, 2, "a", imbalance.chances(targets))


def test_dropout_is_that_of_the_job_where_something_is_tuned() -> None:
    job = image_job("squeezenet1_1", tune={"method": "full"}, train={"dropout": 0.25})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    layers = [m for m in learner.model.modules() if isinstance(m, nn.Dropout)]
    assert layers and {layer.p for layer in layers} == {0.25}


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (image_job("squeezenet1_1", train={"dropout": 0.5}), r"train\.dropout: a head on a frozen backbone"),
        (
            job_of("focal", train={"label_smoothing": 0.1}),
            r'train\.label_smoothing: it goes with imbalance = "sampling" or none, found "focal"',
        ),
        (
            job_of(None, task={"name": "forecasting"}, train={"label_smoothing": 0.1}),
            r"train\.label_smoothing: forecasting has no labels to smooth",
        ),
        (
            job_of(
                "sampling",
                privacy={"unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.2},
            ),
            r'train\.imbalance: expected "focal" under example-level privacy, found "sampling"',
        ),
    ],
    ids=["dropout", "two-losses", "no-classes", "privacy"],
)
def test_what_has_no_meaning_is_refused(job: Job, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_fits(job, task_named(job.task.name))


def test_a_network_without_dropout_says_so() -> None:
    job = image_job("resnet18", tune={"method": "last-k", "layers": 1}, train={"dropout": 0.5})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match=r"train\.dropout: no layer of dropout is where this job tunes"):
        _ = learner.model


def test_under_privacy_smoothed_labels_keep_the_account(tmp_path: Path) -> None:
    private = {
        "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "sampling_rate": 0.2, "seeded_noise": True,
    }  # fmt: skip
    smooth, plain = (
        simulate(
            job_of(None, privacy=private, train={"lr": 0.5, "batch_size": 16} | train),
            tmp_path / name, on_event=ignore_events, report=False,
        )
        for name, train in (("smooth", {"label_smoothing": 0.1}), ("plain", {}))
    )  # fmt: skip
    assert smooth.privacy["epsilon"] == plain.privacy["epsilon"] > 0
    assert smooth.model_sha256 != plain.model_sha256


def test_a_clients_training_repeats_bit_for_bit_under_dropout() -> None:
    from atoll.client.training.local_sgd import train_model

    job = image_job("squeezenet1_1", tune={"method": "full"}, train={"dropout": 0.5, "lr": 0.01})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    shard, first = grey_png_shard(9, classes=3), learner.initial()
    found = [
        train_model(learner, first, shard, job, client=client, round=1, plan={}).delta
        for client in ("a", "a", "b")
    ]
    name = max(found[0])
    assert torch.equal(found[0][name], found[1][name]) and not torch.equal(found[0][name], found[2][name])
