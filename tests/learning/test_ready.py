"""Inputs that are decoded once: the same tensors, in bounded memory."""

from collections.abc import Sequence

import torch

from atoll.backbones.encoder import Encoder
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.learning.input_cache import ReadyInputs
from atoll.learning.learner import Learner
from atoll.tasks import task_named
from tests.support.small import grey_png_shard, image_job


class Counts(Encoder):
    """Numbers as tensors of 4 bytes, and how many of them it was asked for."""

    asked = 0

    def preprocess(self, inputs: Sequence[int]) -> list[torch.Tensor]:
        self.asked += len(inputs)
        return [torch.tensor([float(number)]) for number in inputs]


def shard(*numbers: int) -> Shard:
    return Shard(numbers, torch.zeros(len(numbers)), tuple(str(number).encode() for number in numbers))


def test_an_input_is_decoded_once_and_comes_in_the_order_asked_for() -> None:
    encoder, ready, numbers = Counts(), ReadyInputs(), shard(5, 6, 7)
    assert [float(t) for t in ready.of(encoder, numbers, [2, 0])] == [7, 5]
    assert [float(t) for t in ready.of(encoder, numbers, [0, 1, 2])] == [5, 6, 7]
    assert encoder.asked == 3


def test_equal_examples_in_one_batch_are_one() -> None:
    encoder, ready = Counts(), ReadyInputs()
    assert [float(t) for t in ready.of(encoder, shard(5, 5, 6), [0, 1, 2])] == [5, 5, 6]
    assert encoder.asked == 2


def test_what_was_asked_for_longest_ago_is_let_go() -> None:
    encoder, ready, numbers = Counts(), ReadyInputs(kept_bytes=8), shard(5, 6, 7)
    for row in (0, 1, 0, 2):  # two of 4 bytes fit: the last one takes the place of 6
        ready.of(encoder, numbers, [row])
    assert encoder.asked == 3
    ready.of(encoder, numbers, [0])
    assert encoder.asked == 3
    ready.of(encoder, numbers, [1])
    assert encoder.asked == 4


def test_a_batch_that_does_not_fit_is_whole_all_the_same() -> None:
    ready = ReadyInputs(kept_bytes=4)
    assert [float(t) for t in ready.of(Counts(), shard(5, 6, 7), [0, 1, 2])] == [5, 6, 7]


def test_training_on_kept_inputs_gives_the_bits_of_decoding_them_again() -> None:
    job = image_job("mobilenet_v2", tune={"method": "full"})
    found = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    data, first = grey_png_shard(10, classes=3), found.initial()
    found._ready = ReadyInputs(kept_bytes=0)
    plain = train_model(found, first, data, job, client="c", round=1, plan={})
    found._ready = ReadyInputs()
    for _ in range(2):
        kept = train_model(found, first, data, job, client="c", round=1, plan={})
        assert all(torch.equal(kept.delta[name], delta) for name, delta in plain.delta.items())
