"""Local training by per-example gradients, against a loop of batches of one, layer by layer."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.client.dp.example_draws import example_numbers
from atoll.client.dp.mixed_examples import mixing_layers
from atoll.client.dp.per_example_gradients import hooks_suffice, per_example_gradients
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.privacy.noise import seeded
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.tensors import Tensors
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.sim.engines.test_at_once import text_job
from tests.support.small import grey_png_shard, image_job


def learner_of(job: Job, *classes: str) -> Learner:
    return Learner.of(job, task_named(job.task.name), {"classes": list(classes)})


def private(clipping_norm: float = 0.5, noise: float = 1e-9) -> DpSgd:
    def draw(client: str, numbers: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
        return [np.array([0, 2, 3]), np.array([], dtype=np.int64), np.arange(len(numbers))]

    return DpSgd(clipping_norm, noise, 4.0, lambda c: seeded(stream_seed(1, "noise", c)), draw)


def by_hand(learner: Learner, start: Tensors, shard: Shard, how: DpSgd) -> tuple[Tensors, list[float]]:
    """Examples one by one by autograd, clipped, added, divided; plain SGD."""
    model, lr = learner.model, learner.job.train.lr
    trainable.load_values(model, start)
    trainable.training_mode(model)
    parameters, norms = trainable.trainable(model), []
    assert how.draw is not None
    for rows in how.draw("c", example_numbers(shard.keys)):
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
        for row in rows.tolist():
            model.zero_grad()
            outputs = model(learner.collate(shard, [row]))
            learner.task.loss(outputs, shard.targets[[row]]).backward()  # type: ignore[no-untyped-call]
            own = {n: p.grad.double() for n, p in parameters.items() if p.grad is not None}
            norm = float(torch.stack([g.square().sum() for g in own.values()]).sum().sqrt())
            norms.append(norm)
            for name, g in own.items():
                total[name] += g * min(1.0, how.clipping_norm / norm) / how.divisor
        with torch.no_grad():
            for name, p in parameters.items():
                p -= (lr * total[name]).to(p.dtype)
    return {n: p.detach() - start[n] for n, p in parameters.items()}, norms


CASES: dict[str, tuple[str | None, dict[str, Any], bool]] = {
    "image, last block": ("squeezenet1_1", {"method": "last-k", "layers": 1}, True),
    "image, LoRA": ("squeezenet1_1", {"method": "lora", "rank": 2}, True),
    "image, all, batch norm": ("mobilenet_v2", {"method": "full"}, False),
    "text, LoRA": (None, {"method": "lora", "rank": 2}, True),
    "text, all, position embeddings": (None, {"method": "full"}, False),
}
"""The backbone, what is tuned, and whether Opacus' hooks see every example's gradient."""


def case(name: str, folder: Path, count: int) -> tuple[Learner, Shard]:
    network, tune, _ = CASES[name]
    if network is not None:
        return learner_of(image_job(network, tune=tune), *"012"), grey_png_shard(count, classes=3)
    job = text_job(folder, tune=tune)
    learner, population = learner_of(job, "a", "b"), Population.of(job)
    return learner, population.whole(learner).select(range(count))


@pytest.mark.parametrize("name", CASES)
def test_the_update_is_that_of_examples_taken_one_by_one(name: str, tmp_path: Path) -> None:
    learner, shard = case(name, tmp_path, 6)
    for module in learner.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start, how = learner.initial(), private()
    found = train_privately(learner, start, shard, how, client="c", round=1, plan={})
    expected, norms = by_hand(learner, start, shard, how)
    assert max(norms) > how.clipping_norm
    assert expected.keys() == found.delta.keys()
    whole = torch.cat([expected[tensor].flatten().double() for tensor in expected])
    ours = torch.cat([found.delta[tensor].flatten().double() for tensor in expected])
    # A delta is a difference of float32 numbers: what is rounded is of the size of the parameters.
    rounding = 3e-7 * float(torch.cat([start[tensor].flatten().double() for tensor in expected]).norm())
    assert float((ours - whole).norm()) < 1e-3 * float(whole.norm()) + rounding
    assert found.num_examples == 1


def test_noise_is_added_once_a_step_over_all_tensors(tmp_path: Path) -> None:
    """z C / 4 * lr * sqrt(3 steps) in every number, with the divisor of 4."""
    learner, shard = case("image, last block", tmp_path, 40)
    start = learner.initial()
    loud = train_privately(learner, start, shard, private(noise=50.0), client="c", round=1, plan={})
    numbers = torch.cat([d.flatten() for d in loud.delta.values()]).double()
    expected = 50.0 * 0.5 / 4 * learner.job.train.lr * 3**0.5
    # 40 examples pass in two parts: noise for each part would be a sixth too much.
    assert float(numbers.std()) == pytest.approx(expected, rel=5 / (2 * len(numbers)) ** 0.5)


@pytest.mark.parametrize("name", CASES)
def test_hooks_are_used_where_they_see_every_gradient_and_nowhere_else(name: str, tmp_path: Path) -> None:
    learner, shard = case(name, tmp_path, 2)
    trainable.training_mode(learner.model)
    batch = learner.collate(shard, [0, 1])
    assert hooks_suffice(learner.model, learner.task.loss, batch, shard.targets) == CASES[name][2]


def test_hooks_leave_the_model_as_it_was(tmp_path: Path) -> None:
    learner, shard = case("image, last block", tmp_path, 2)
    trainable.training_mode(learner.model)
    batch = learner.collate(shard, [0, 1])
    for _ in range(2):
        with per_example_gradients(learner.model, learner.task.loss, hooks=True) as gradients:
            gradients(batch, shard.targets)
    assert all(p.grad is None for p in learner.model.parameters())
    assert not [m for m in learner.model.modules() if m._forward_hooks or m._backward_hooks]


class Centred(nn.Module):
    """Takes the mean over the batch away: every example sees the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


class Wrapped(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 4), middle, nn.Linear(4, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.last(self.middle(self.first(batch["x"])))
        return out


@pytest.mark.parametrize(
    ("middle", "mixes"),
    [
        (Centred(), True),
        (nn.BatchNorm1d(4), True),
        (nn.BatchNorm1d(4, affine=False), True),
        (nn.BatchNorm1d(4).eval(), False),
        (nn.LayerNorm(4), False),
        (nn.Dropout(0.5), False),
        (nn.ReLU(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_mixes_examples_is_found_by_name(middle: nn.Module, mixes: bool) -> None:
    model = Wrapped(middle)
    batch = {"x": torch.randn(4, 5, generator=torch.Generator().manual_seed(1))}
    assert mixing_layers(model, batch) == (["middle"] if mixes else [])


def test_a_backbone_that_mixes_examples_is_refused_by_the_layers_name(tmp_path: Path) -> None:
    learner, shard = case("image, last block", tmp_path, 4)
    features = cast(nn.Sequential, learner.encoder.model.get_submodule("features"))
    features[0] = nn.Sequential(features[0], Centred())
    with pytest.raises(ConfigError, match=r"layer backbone\.model\.features\.0\.1 mixes the examples"):
        train_privately(learner, learner.initial(), shard, private(), client="c", round=1, plan={})
