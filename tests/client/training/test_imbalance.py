"""Losses for uneven classes: against autograd, the same bits in every engine, gains and refusals."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import nn

from atoll.client.heads.class_imbalance import balanced
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.compatibility import check_fits
from atoll.learning.objective.class_imbalance import Imbalance, counts_of
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks import task_named

KINDS = ("weights", "focal", "logits")
TABLE: dict[str, Any] = {
    "name": "uneven",
    "seed": 3,
    "task": {"name": "image-classification"},
    "data": {"source": "digits", "partition": {"kind": "dirichlet", "alpha": 0.3}},
    "backbone": {"name": "raw:pixels", "image_size": 8},
    "train": {"lr": 0.5, "batch_size": 16},
    "federation": {"clients": 6, "rounds": 2},
}


def job_of(kind: str | None, strength: float | None = None, **tables: Any) -> Job:
    uneven = {"imbalance": kind, "imbalance_strength": strength} if kind else {}
    table = {
        key: TABLE.get(key, {}) | tables[key] if key in tables else TABLE[key] for key in {**TABLE, **tables}
    }
    return Job.parse(table | {"train": table["train"] | uneven}, origin="test")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # as the job's `threads` says, for what is called here without a run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_the_closed_form_is_autograds(kind: str, strength: float) -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 8, 5, generator=generator) * 3
    targets = torch.randint(0, 4, (3, 8), generator=generator)
    imbalance = Imbalance(kind, strength)  # type: ignore[arg-type]
    counts = torch.stack([counts_of(one, 5) for one in targets])
    closed = balanced(LOSSES["softmax"], imbalance, counts)
    error, numbers = closed.grad(outputs.clone(), targets)
    for client in range(3):
        own = outputs[client].clone().requires_grad_()
        value = imbalance.loss(counts[client])(own, targets[client])
        (gradient,) = torch.autograd.grad(value * 8, own)
        assert torch.allclose(error[client], gradient, atol=2e-6), kind
        assert float(closed.value(numbers)[client].mean()) == pytest.approx(value.item(), rel=1e-5)


def test_weights_by_hand() -> None:
    # 12 examples of three classes that are there: 12 / 3 = 4 of each would be even.
    found = Imbalance("weights", 1.0).weights(torch.tensor([8.0, 2.0, 2.0, 0.0]))
    assert found.tolist() == [0.5, 2.0, 2.0, 0.0]
    shifted = Imbalance("logits", 2.0).shifts(torch.tensor([8.0, 0.0]))
    assert shifted.tolist() == pytest.approx([2 * np.log(0.9), 2 * np.log(0.1)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_clients_bits_do_not_depend_on_its_company(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    features, targets = (
        torch.randn(300, 20, generator=generator),
        torch.randint(0, 7, (300,), generator=generator),
    )
    head = {"head.weight": torch.randn(7, 20, generator=generator), "head.bias": torch.zeros(7)}
    ends = np.cumsum([0, 3, 40, 17, 1, 100, 64, 75])
    client_rows = [ClientRows(f"c{i}", np.arange(a, b)) for i, (a, b) in enumerate(pairwise(ends))]
    local = HeadTrainingConfig(job_of(kind), LOSSES["softmax"], round=1)
    examples = FeatureTable.of(features, targets)
    together = {update.client: update.delta for update in train_heads(head, examples, client_rows, local)}
    for work in client_rows:
        (alone,) = train_heads(head, examples, [work], local)
        assert all(torch.equal(alone.delta[name], t) for name, t in together[work.client].items()), (
            work.client
        )


@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree_and_it_makes_a_difference(kind: str, tmp_path: Path) -> None:
    whole, looped, plain = (
        simulate(job, tmp_path / name, engine=engine, on_event=ignore_events, report=False).model_sha256
        for name, engine, job in (
            ("inline", "inline", job_of(kind)),
            ("loop", "loop", job_of(kind)),
            ("plain", "inline", job_of(None)),
        )
    )
    assert whole == looped != plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_autograd_is_that_of_the_closed_form(kind: str) -> None:
    shard_targets = torch.tensor([0, 0, 0, 1, 2, 2])
    linear = nn.Linear(4, 3)
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    imbalance = Imbalance.of(job_of(kind))
    assert imbalance is not None
    value = imbalance.loss(counts_of(shard_targets, 3))(linear(features), shard_targets)
    weight, bias = torch.autograd.grad(value, [linear.weight, linear.bias])
    head = {"head.weight": linear.weight.detach(), "head.bias": linear.bias.detach()}
    job = job_of(kind, train={"lr": 1.0, "batch_size": 6})
    (update,) = train_heads(
        head,
        FeatureTable.of(features, shard_targets),
        [ClientRows("a", np.arange(6))],
        HeadTrainingConfig(job, LOSSES["softmax"], 1),
    )
    assert torch.allclose(update.delta["head.weight"], -weight, atol=1e-6)
    assert torch.allclose(update.delta["head.bias"], -bias, atol=1e-6)


def uneven_digits(folder: Path) -> Path:
    """Digits of which one in fifty is of the last five classes; the test part is even."""
    from atoll.datasets.registry import load_source

    rows = load_source("digits")["train"].to_pylist()
    common = [row for row in rows[:1200] if row["label"] in "01234"]
    rare = [row for row in rows[:1200] if row["label"] in "56789"][: len(common) // 50]
    train = datasets.Dataset.from_list(common + rare)
    test = datasets.Dataset.from_list(rows[1200:])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(folder))
    return folder


@pytest.mark.slow
def test_rare_classes_are_found_more_often(tmp_path: Path) -> None:
    source = uneven_digits(tmp_path / "data")
    found = {}
    for kind in (None, *KINDS):
        job = job_of(
            kind,
            data={"source": str(source), "partition": {"kind": "iid"}},
            federation={"clients": 2, "rounds": 30},
            train={"lr": 2.0, "batch_size": 16},
        )
        result = simulate(job, tmp_path / str(kind), on_event=ignore_events, report=False)
        found[kind] = result.final["server"]["macro_f1"]
    assert found["weights"] > found[None] + 0.05, found
    assert found["logits"] > found[None] + 0.05, found
    assert found["focal"] > found[None] - 0.02, found


def test_under_example_level_privacy_only_focal_loss_keeps_the_promise(tmp_path: Path) -> None:
    private = {
        "unit": "example",
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "sampling_rate": 0.2,
        "seeded_noise": True,
    }
    task = task_named("image-classification")
    for kind in ("weights", "logits"):
        with pytest.raises(
            ConfigError, match=r'train\.imbalance: expected "focal" under example-level privacy'
        ):
            check_fits(job_of(kind, privacy=private), task)
    focal, plain = (
        simulate(job_of(kind, privacy=private), tmp_path / str(kind), on_event=ignore_events, report=False)
        for kind in ("focal", None)
    )
    assert focal.privacy["epsilon"] == plain.privacy["epsilon"] > 0
    assert focal.model_sha256 != plain.model_sha256


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"task": {"name": "forecasting"}}, r"train\.imbalance: forecasting has no classes"),
        ({"task": {"name": "question-answering"}}, r"train\.imbalance: question-answering has no classes"),
    ],
)
def test_what_has_no_classes_is_refused(tables: dict[str, Any], said: str) -> None:
    from atoll.learning.objective.class_imbalance import check_imbalance

    job = job_of("focal", **tables)
    with pytest.raises(ConfigError, match=said):
        check_imbalance(job, task_named(job.task.name))


def test_a_strength_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="imbalance_strength has no meaning without imbalance"):
        job_of(None, train={"imbalance_strength": 2.0})


def test_a_client_without_examples_has_no_chances() -> None:
    chances = Imbalance("sampling", 1.0).chances(torch.zeros(0, dtype=torch.int64))
    assert chances is not None and chances.shape == (0,)
