"""Batched heads: torch's autograd as the oracle for the values, each client alone for the bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import opacus
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES
from atoll.client.heads.train import HeadTrainingConfig
from atoll.client.heads.train import train_heads as train_stacked
from atoll.client.training.batches import batches
from atoll.client.training.optimizers import torch_optimizer
from atoll.job.job import Job
from atoll.privacy.noise import RandomBits, lattice_for, seeded, uniform
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.tensors import Tensors


def job(**train: object) -> Job:
    table = {
        "name": "t",
        "seed": 5,
        "task": {"name": "text-classification"},
        "data": {"source": "x"},
        "backbone": {"name": "hf:x"},
        "train": train,
    }
    return Job.parse(table, origin="test")


@dataclass(frozen=True)
class Own:
    """One client's own examples."""

    client: str
    features: torch.Tensor
    targets: torch.Tensor


def train_heads(
    start: Tensors, client_rows: Sequence[Own], job: Job, round: int, plan: Mapping[str, float], **more: Any
) -> Sequence[Update]:
    """All clients' examples in one table, as a simulation has them."""
    table = FeatureTable.of(
        torch.cat([w.features for w in client_rows]), torch.cat([w.targets for w in client_rows])
    )
    ends = np.cumsum([len(w.targets) for w in client_rows])
    rows = [
        ClientRows(w.client, np.arange(e - len(w.targets), e), np.arange(len(w.targets), dtype=np.uint64))
        for w, e in zip(client_rows, ends, strict=True)
    ]
    loss = LOSSES[more.pop("loss", "softmax")]
    return train_stacked(
        start, table, rows, HeadTrainingConfig(job, loss, round, plan.get("proximal_mu", 0.0), **more)
    )


def work(client: str, count: int, width: int, classes: int, seed: int, loss: str = "softmax") -> Own:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=g)
    if loss == "softmax":
        return Own(client, features, torch.randint(classes, (count,), generator=g))
    features /= width**0.5  # larger ones let squares diverge
    values = torch.randn(count, classes, generator=g)
    return Own(client, features, (values > 0).float() if loss == "sigmoid" else values)


def head(width: int, classes: int, hidden: int | None = None) -> Tensors:
    """Initial values of one layer, or of two."""
    g = torch.Generator().manual_seed(1)
    if hidden is None:
        return {
            "head.weight": 0.1 * torch.randn(classes, width, generator=g),
            "head.bias": 0.1 * torch.randn(classes, generator=g),
        }
    return {
        "head.0.weight": torch.randn(hidden, width, generator=g) / width**0.5,
        "head.0.bias": 0.1 * torch.randn(hidden, generator=g),
        "head.2.weight": torch.randn(classes, hidden, generator=g) / hidden**0.5,
        "head.2.bias": 0.1 * torch.randn(classes, generator=g),
    }


def module(start: Tensors) -> torch.nn.Sequential:
    """The same head as torch's own layers, in float64."""
    parts: list[torch.nn.Module] = []
    for name in sorted(n for n in start if n.endswith("weight")):
        layer = torch.nn.Linear(*reversed(start[name].shape)).double()
        layer.weight.data.copy_(start[name])
        layer.bias.data.copy_(start[name.replace("weight", "bias")])
        parts += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*parts[:-1])


TORCH_LOSSES = {
    "softmax": torch.nn.functional.cross_entropy,
    "sigmoid": torch.nn.functional.binary_cross_entropy_with_logits,
    "squared": torch.nn.functional.mse_loss,
}


def named(start: Tensors, model: torch.nn.Sequential) -> Tensors:
    """The module's values by the head's names."""
    if "head.weight" in start:
        return {f"head.{n.split('.')[1]}": p for n, p in model.named_parameters()}
    return {f"head.{n}": p for n, p in model.named_parameters()}


def by_autograd(
    start: Tensors, item: Own, job: Job, plan: Mapping[str, float], loss_name: str = "softmax"
) -> Tensors:
    """The obvious way: one client, nn.Linear, autograd, torch.optim, in float64."""
    model = module(start)
    optimizer = torch_optimizer(model.parameters(), job.train)
    targets = item.targets if loss_name == "softmax" else item.targets.double()
    for rows in batches(len(targets), job, 3, item.client):
        loss = TORCH_LOSSES[loss_name](model(item.features[rows].double()), targets[rows])
        for name, p in named(start, model).items():
            loss = loss + plan.get("proximal_mu", 0) / 2 * (p - start[name]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {n: p.detach() - start[n] for n, p in named(start, model).items()}


@pytest.mark.parametrize(
    "train",
    [
        {"lr": 0.1, "batch_size": 8},
        {"lr": 0.1, "batch_size": 8, "epochs": 3, "momentum": 0.9},
        {"lr": 0.1, "batch_size": 5, "weight_decay": 0.01},
        {"lr": 0.01, "batch_size": 8, "optimizer": "adam", "epochs": 2},
        {"lr": 0.01, "batch_size": 8, "optimizer": "adam", "weight_decay": 0.1},
        {"lr": 0.01, "batch_size": 8, "optimizer": "adamw", "weight_decay": 0.1, "epochs": 2},
        {"lr": 0.1, "batch_size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", [{}, {"proximal_mu": 0.5}], ids=["plain", "proximal"])
@pytest.mark.parametrize("hidden", [None, 5], ids=["one layer", "two layers"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_cohort_learns_what_autograd_learns_client_by_client(
    train: dict[str, object], plan: dict[str, float], hidden: int | None, loss: str
) -> None:
    start, setting = head(13, 4, hidden), job(**train)
    client_rows = [work(f"c{i}", count, 13, 4, i, loss) for i, count in enumerate([1, 2, 7, 8, 9, 40])]
    for item, update in zip(
        client_rows, train_heads(start, client_rows, setting, 3, plan, loss=loss), strict=True
    ):
        assert update.client == item.client
        assert update.num_examples == len(item.targets)
        expected = by_autograd(start, item, setting, plan, loss)
        for name, delta in expected.items():
            torch.testing.assert_close(update.delta[name].double(), delta, rtol=2e-4, atol=2e-6)


def own_random_bits(client: str) -> RandomBits:
    return seeded(stream_seed(5, "noise", client))


def own_batches(client: str, numbers: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    count = len(numbers)
    uniforms = uniform(seeded(stream_seed(6, "coins", client))(3 * count)).reshape(3, count)
    return [np.flatnonzero(row < 0.3) for row in uniforms]


@pytest.mark.parametrize("hidden", [None, 5], ids=["one layer", "two layers"])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_example_is_clipped_as_if_its_gradient_were_taken_alone(hidden: int | None, loss: str) -> None:
    start, item = head(13, 4, hidden), work("c", 9, 13, 4, 0, loss)
    setting = job(lr=0.5, batch_size=9)
    found = train_heads(
        start, [item], setting, 1, {}, loss=loss, per_example=DpSgd(0.3, 0.0, 20.0, own_random_bits)
    )[0]
    total: Tensors = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in start.items()}
    norms = []
    for row in range(9):
        model = module(start)
        target = item.targets[row : row + 1]
        target = target if loss == "softmax" else target.double()
        TORCH_LOSSES[loss](model(item.features[row : row + 1].double()), target).backward()
        own = {n: p.grad for n, p in named(start, model).items()}
        norm = float(torch.stack([g.square().sum() for g in own.values()]).sum().sqrt())
        norms.append(norm)
        for name, g in own.items():
            total[name] += g * min(1.0, 0.3 / norm)
    assert max(norms) > 0.3
    for name, gradient in total.items():
        torch.testing.assert_close(found.delta[name].double(), -0.5 * gradient / 20, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_clips_the_same_way() -> None:
    start, item = head(13, 4, 5), work("c", 9, 13, 4, 0)
    found = train_heads(
        start, [item], job(lr=0.5, batch_size=9), 1, {}, per_example=DpSgd(0.3, 0.0, 9.0, own_random_bits)
    )[0]
    model = opacus.GradSampleModule(module(start).float())
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5), noise_multiplier=0.0, max_grad_norm=0.3,
        expected_batch_size=9,
    )  # fmt: skip
    torch.nn.functional.cross_entropy(model(item.features), item.targets).backward()
    optimizer.step()
    for name, p in named(start, model._module).items():
        torch.testing.assert_close(found.delta[name], p.detach() - start[name], rtol=1e-4, atol=1e-6)


def test_noise_has_its_scale_in_every_number_and_comes_from_the_client() -> None:
    start, setting = head(40, 10), job(lr=1.0, batch_size=4)
    client_rows = [work(f"c{i}", 4, 40, 10, i) for i in range(200)]
    quiet = train_heads(start, client_rows, setting, 1, {}, per_example=DpSgd(0.3, 0.0, 8.0, own_random_bits))
    loud = train_heads(start, client_rows, setting, 1, {}, per_example=DpSgd(0.3, 2.0, 8.0, own_random_bits))
    noise = torch.stack([
        torch.cat([(a.delta[n] - b.delta[n]).flatten() for n in start])
        for a, b in zip(loud, quiet, strict=True)
    ])  # fmt: skip
    # 2.0 * 0.3 / 8 = 0.075, over 200 clients x 410 numbers.
    assert float(noise.std()) == pytest.approx(0.075, rel=4 / (2 * 82_000) ** 0.5)
    assert abs(float(noise.mean())) < 4 * 0.075 / 82_000**0.5
    lattice = lattice_for(2.0, 0.3 / 8, 410, own_random_bits("c3"))
    expected = -torch.from_numpy(lattice.noise(410))
    torch.testing.assert_close(noise[3].double(), expected, rtol=1e-3, atol=1e-5)


def test_a_correction_is_added_to_every_gradient() -> None:
    # One step of one full batch, learning rate 0.5: the delta is -0.5 * (gradient + correction).
    start, item, setting = head(6, 3), work("c", 8, 6, 3, 0), job(lr=0.5, batch_size=8)
    correction = {n: torch.full_like(t, 0.25) for n, t in start.items()}
    plain = train_heads(start, [item, work("d", 8, 6, 3, 1)], setting, 1, {})
    moved = train_heads(start, [item, work("d", 8, 6, 3, 1)], setting, 1, {}, corrections={"c": correction})
    for name in start:
        torch.testing.assert_close(moved[0].delta[name], plain[0].delta[name] - 0.125)
        assert torch.equal(moved[1].delta[name], plain[1].delta[name])


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(1, 70), min_size=2, max_size=12),
    width=st.integers(2, 400),
    classes=st.integers(2, 21),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 3),
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    mu=st.sampled_from([0.0, 0.1]),
    hidden=st.sampled_from([None, None, 7, 40]),
    loss=st.sampled_from(["softmax", "softmax", "sigmoid", "squared"]),
    private=st.sampled_from(["no", "shuffled", "drawn"]),
)
def test_a_clients_bits_do_not_depend_on_its_cohort(
    counts: list[int],
    width: int,
    classes: int,
    batch_size: int,
    epochs: int,
    optimizer: str,
    weight_decay: float,
    mu: float,
    hidden: int | None,
    loss: str,
    private: str,
) -> None:
    torch.set_num_threads(1)
    setting = job(
        batch_size=batch_size, epochs=epochs, optimizer=optimizer, weight_decay=weight_decay, lr=0.05
    )
    start = head(width, classes, hidden)
    client_rows = [work(f"c{i}", count, width, classes, i, loss) for i, count in enumerate(counts)]
    draw = own_batches if private == "drawn" else None
    clipped = None if private == "no" else DpSgd(0.7, 1.1, float(batch_size), own_random_bits, draw)
    more: dict[str, Any] = {"plan": {"proximal_mu": mu}, "loss": loss, "per_example": clipped}
    together = train_heads(start, client_rows, setting, 1, **more)
    backwards = train_heads(start, client_rows[::-1], setting, 1, **more)[::-1]
    for item, a, b in zip(client_rows, together, backwards, strict=True):
        alone = train_heads(start, [item], setting, 1, **more)[0]
        for name in start:
            assert torch.equal(a.delta[name], alone.delta[name]), (name, item.client)
            assert torch.equal(b.delta[name], alone.delta[name]), (name, item.client)


def test_a_hundred_clients_of_the_demos_shape_have_the_bits_of_one() -> None:
    torch.set_num_threads(1)
    setting, start = job(batch_size=10), head(384, 10)
    client_rows = [work(f"c{i:03d}", 40 + i % 21, 384, 10, i) for i in range(100)]
    for item, update in zip(client_rows, train_heads(start, client_rows, setting, 1, {}), strict=True):
        alone = train_heads(start, [item], setting, 1, {})[0]
        assert all(torch.equal(update.delta[n], alone.delta[n]) for n in start)


def test_the_reported_loss_is_the_mean_over_all_visits() -> None:
    start, item = head(6, 3), work("c", 10, 6, 3, 0)
    update = train_heads(start, [item], job(lr=1e-12, batch_size=4, epochs=2), 1, {})[0]
    expected = torch.nn.functional.cross_entropy(
        item.features @ start["head.weight"].T + start["head.bias"], item.targets
    )
    found = update.states["train_loss.sum"] / update.states["train_loss.count"]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 3))
def test_every_row_is_visited_once_an_epoch(count: int, batch_size: int, epochs: int) -> None:
    plan = batches(count, job(batch_size=batch_size, epochs=epochs), 1, "c")
    seen = sorted(row for batch in plan for row in batch)
    assert seen == sorted(list(range(count)) * epochs)
    assert max(len(batch) for batch in plan) <= batch_size


def test_order_depends_on_round_client_and_seed_and_on_nothing_else() -> None:
    assert batches(50, job(), 1, "a") == batches(50, job(), 1, "a")
    others = [batches(50, job(), 2, "a"), batches(50, job(), 1, "b"), batches(50, job(epochs=2), 1, "a")[4:]]
    assert all(batches(50, job(), 1, "a") != other for other in others)


def test_permutations_are_uniform_and_differ_between_seeds() -> None:
    from atoll.client.training.batches import permutations

    many = permutations([4] * 24_000, range(24_000))
    counts = np.unique(many, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(counts - 1000).max() < 5 * 1000**0.5


def test_splitmix64_gives_its_published_numbers() -> None:
    """The first outputs from seed 1234567, as listed with the reference implementation."""
    from atoll.client.training.batches import random_numbers

    found = random_numbers(np.array([1234567], dtype=np.uint64), 3)[0].tolist()
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
