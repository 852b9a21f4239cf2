"""One example more moves a client's sum by the clipping norm at most, whatever is drawn and kept back."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import atoll.client.dp.dp_sgd_model
import atoll.client.dp.private_examples
import atoll.client.heads.train
import atoll.learning.split
import atoll.tasks.forecasting.task
import atoll.tasks.medical.task
from atoll.backbones.encoder import Variation
from atoll.client.dp.dp_sgd_model import model_sums, train_privately
from atoll.client.training.batches import epoch_seeds, sample_views
from atoll.data.shard import Shard
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import global_stream, stream
from tests.privacy.detectors import Detected
from tests.privacy.runs.neighbours import (
    check_moved,
    flat,
    learner_start,
    moved,
    of_task,
    pictures,
    quiet,
    summed,
    trained_head,
)

STEP: dict[str, Any] = {"lr": 1.0, "batch_size": 1}
VARIED = STEP | {"augment": ["crop", "flip"]}
HALF: dict[str, Any] = {"source": "digits", "validation_fraction": 0.3}

Made = tuple[Learner, Shard]
CASES: dict[str, tuple[Callable[[Path], Made], Any]] = {
    "dropout in a network's last block": (lambda folder: pictures(), summed),
    "augmentation": (lambda folder: pictures(train=VARIED), summed),
    "kept views": (
        lambda folder: pictures(tune={"method": "head"}, train=VARIED | {"cached_views": 4}), trained_head,
    ),
    "a split of pictures": (
        lambda folder: pictures(tune={"method": "head"}, train=STEP, data=HALF), trained_head,
    ),
    "dropout of histories": (
        lambda folder: of_task("recommendation", "full", folder, 24, train=STEP | {"dropout": 0.5}), summed,
    ),
    "dropout of texts": (
        lambda folder: of_task("text-classification", "full", folder, 24, train=STEP | {"dropout": 0.5}),
        summed,
    ),
    "a split of series": (lambda folder: of_task("forecasting", "full", folder, 25, train=STEP), summed),
    "a split of patients": (
        lambda folder: of_task("medical-imaging", "head", folder, 35, train=STEP), trained_head,
    ),
}  # fmt: skip
SOON = ("kept views", "a split of pictures", "a split of patients")


def marked(name: str) -> Any:
    return pytest.param(name, marks=() if name in SOON else pytest.mark.slow)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_one_example_moves_the_sum_by_the_clipping_norm_at_most(name: str, tmp_path: Path) -> None:
    make, total = CASES[name]
    check_moved(*make(tmp_path / "data"), total)


def by_place(numbers: Any, seed: int, step: Any) -> AbstractContextManager[None]:
    """Draws as torch makes them: one generator for the batch, in its order."""
    return global_stream(seed, "dropout", *step[:2])


def varied_by_place(numbers: Any, job: Any, step: Any) -> Variation:
    draw = stream(job.seed, "augment", *step)
    return Variation(job.train.augment, lambda place: draw)


def views_by_place(numbers: Any, views: int, job: Any, step: Any) -> Any:
    seeds = epoch_seeds(job, step[0], [step[1]], step[2], "view")
    return sample_views(views, seeds, len(numbers))[0]


def by_count(marks: Any, fraction: float, *, helped: bool) -> Any:
    """A share of the number of examples, those with the lowest marks."""
    kept = np.zeros(len(marks), dtype=bool)
    kept[np.argsort(marks, kind="stable")[: round(len(marks) * fraction)]] = True
    return kept


def by_time(shard: Shard, fraction: float) -> Any:
    return atoll.tasks.forecasting.task._last_part_of_the_time(shard, fraction)


PLANTS: dict[str, tuple[Any, str, Any]] = {
    "dropout in a network's last block": (atoll.client.dp.private_examples, "example_draws", by_place),
    "dropout of histories": (atoll.client.dp.private_examples, "example_draws", by_place),
    "dropout of texts": (atoll.client.dp.private_examples, "example_draws", by_place),
    "augmentation": (atoll.client.dp.private_examples, "example_variation", varied_by_place),
    "kept views": (atoll.client.heads.train, "example_views", views_by_place),
    "a split of pictures": (
        atoll.learning.split, "kept_back",
        lambda marks, data, helped: by_count(marks, data.validation_fraction, helped=helped),
    ),
    "a split of patients": (atoll.tasks.medical.task, "by_fraction", by_count),
    "a split of series": (
        atoll.tasks.forecasting.task.Forecasting, "split",
        lambda self, shard, seed, fraction, helped: by_time(shard, fraction),
    ),
}  # fmt: skip
"""By case: what used to be done, and where."""


@pytest.mark.parametrize("name", [marked(name) for name in PLANTS])
def test_what_used_to_be_done_moves_it_further(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, total = CASES[name]
    monkeypatch.setattr(*PLANTS[name])
    monkeypatch.setattr(atoll.client.dp.dp_sgd_model, "refuse_mixed_examples", lambda *given, **more: None)
    with pytest.raises(Detected, match="moves the sum"):
        check_moved(*make(tmp_path / "data"), total)


def test_a_distributed_sum_has_the_same_bits_twice_and_is_what_a_client_trains_by() -> None:
    learner, shard = pictures()
    start, how = learner_start(learner), quiet(learner.job)
    found = []
    for _ in range(2):
        torch.rand(17), random.random(), np.random.random()  # whatever else draws in between
        [(_, total)] = model_sums(learner, start, {"c": shard}, how, 1)
        found.append(flat(total))
    assert np.array_equal(*found)
    update = train_privately(learner, start, shard, how, client="c", round=1, plan={})
    assert float(np.linalg.norm(found[0] + flat(update.delta))) < 1e-5 * float(np.linalg.norm(found[0]))


def test_a_client_that_keeps_everything_back_sends_nothing_but_noise(tmp_path: Path) -> None:
    """Under a promise nobody looks whether that leaves something to train on."""
    learner, shard = pictures()
    empty = shard.select([])
    for total in (
        summed(learner, empty),
        trained_head(pictures(tune={"method": "head"}, train=STEP)[0], empty),
    ):
        assert total.size and not total.any()
    assert max(moved(learner, shard.select([3]), summed).values()) <= 1 + 1e-6
