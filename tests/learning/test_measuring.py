"""What training, merging and measuring a network cost and leave behind, and what bits depend on."""

import os

import pytest
import torch

from atoll.client.training.local_sgd import train_model
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.strategies.mean import moved, moved_by_mean, weighted_mean
from atoll.tasks import task_named
from tests.support.small import grey_png_shard, image_job

CLASSES = 3


@pytest.fixture(scope="module")
def learner() -> Learner:
    job = image_job("squeezenet1_1", tune={"method": "full"})
    return Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})


@pytest.fixture(scope="module")
def tensors(learner: Learner) -> Tensors:
    return learner.initial()


@pytest.mark.parametrize(("examples", "computed"), [(1, 1), (3, 4), (16, 16), (21, 16 + 8)])
def test_a_shard_is_padded_to_the_next_power_of_two(
    learner: Learner, tensors: Tensors, examples: int, computed: int
) -> None:
    rows: list[int] = []
    hook = learner.model.head.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    states = learner.evaluate(tensors, grey_png_shard(examples, classes=CLASSES))
    hook.remove()
    assert sum(rows) == computed
    assert states["loss.count"] == examples


def test_the_number_of_cores_changes_no_bit_of_what_is_measured(
    learner: Learner, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, found = grey_png_shard(40, classes=CLASSES), []
    for cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found.append(learner.outputs(tensors, shard))
    assert torch.equal(*found)


def test_what_a_teacher_says_of_a_row_does_not_depend_on_other_rows(
    learner: Learner, tensors: Tensors
) -> None:
    shard = grey_png_shard(5, classes=CLASSES)
    whole = learner.outputs_by_row(tensors, shard)
    assert torch.equal(learner.outputs_by_row(tensors, shard.select([3, 1])), whole[[3, 1]])


def test_training_leaves_no_gradients_behind(learner: Learner, tensors: Tensors) -> None:
    shard = grey_png_shard(3, classes=CLASSES)
    train_model(learner, tensors, shard, learner.job, client="c", round=1, plan={})
    assert all(p.grad is None for p in learner.model.parameters())


def test_a_model_moved_tensor_by_tensor_has_the_bits_of_one_that_moved_as_a_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    model, *deltas = [{n: torch.randn(5, 3, generator=generator) for n in "ab"} for _ in range(3)]
    updates = [Update(name, 1, delta, 3) for name, delta in zip("xy", deltas, strict=True)]
    whole = moved(model, {name: 0.7 * mean for name, mean in weighted_mean(updates).items()})
    apart = moved_by_mean(model, updates, 0.7)
    assert all(torch.equal(apart[name], whole[name]) for name in model)
