"""Batched heads: torch's autograd as the oracle for the values, each client alone for the bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.batches import batches
from client.heads import Examples, HeadWork
from client.heads import train_heads as train_stacked
from client.steps import torch_optimizer
from protocol.job import Job
from protocol.messages import Update
from protocol.tensors import Tensors


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
    start: Tensors, works: Sequence[Own], job: Job, round: int, plan: Mapping[str, float]
) -> Sequence[Update]:
    """All clients' examples in one table, as a simulation has them."""
    table = Examples.of(torch.cat([w.features for w in works]), torch.cat([w.targets for w in works]))
    ends = np.cumsum([len(w.targets) for w in works])
    rows = [HeadWork(w.client, np.arange(e - len(w.targets), e)) for w, e in zip(works, ends, strict=True)]
    return train_stacked(start, table, rows, job, round, plan)


def work(client: str, count: int, width: int, classes: int, seed: int) -> Own:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=g)
    return Own(client, features, torch.randint(classes, (count,), generator=g))


def head(width: int, classes: int) -> Tensors:
    g = torch.Generator().manual_seed(1)
    return {
        "head.weight": 0.1 * torch.randn(classes, width, generator=g),
        "head.bias": 0.1 * torch.randn(classes, generator=g),
    }


def by_autograd(start: Tensors, item: Own, job: Job, plan: Mapping[str, float]) -> Tensors:
    """The obvious way: one client, nn.Linear, autograd, torch.optim, in float64."""
    layer = torch.nn.Linear(*reversed(start["head.weight"].shape)).double()
    layer.weight.data.copy_(start["head.weight"])
    layer.bias.data.copy_(start["head.bias"])
    optimizer = torch_optimizer(layer.parameters(), job.train)
    for rows in batches(len(item.targets), job, 3, item.client):
        loss = torch.nn.functional.cross_entropy(layer(item.features[rows].double()), item.targets[rows])
        for name, p in layer.named_parameters():
            loss = loss + plan.get("proximal_mu", 0) / 2 * (p - start[f"head.{name}"]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {f"head.{n}": p.detach() - start[f"head.{n}"] for n, p in layer.named_parameters()}


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
def test_a_cohort_learns_what_autograd_learns_client_by_client(
    train: dict[str, object], plan: dict[str, float]
) -> None:
    start, setting = head(13, 4), job(**train)
    works = [work(f"c{i}", count, 13, 4, i) for i, count in enumerate([1, 2, 7, 8, 9, 40])]
    for item, update in zip(works, train_heads(start, works, setting, 3, plan), strict=True):
        assert update.client == item.client
        assert update.num_examples == len(item.targets)
        expected = by_autograd(start, item, setting, plan)
        for name, delta in expected.items():
            torch.testing.assert_close(update.delta[name].double(), delta, rtol=2e-4, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 70), min_size=2, max_size=12),
    width=st.integers(2, 400),
    classes=st.integers(2, 21),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 3),
    optimizer=st.sampled_from(["sgd", "adam", "adamw"]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    mu=st.sampled_from([0.0, 0.1]),
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
) -> None:
    torch.set_num_threads(1)
    setting = job(
        batch_size=batch_size, epochs=epochs, optimizer=optimizer, weight_decay=weight_decay, lr=0.05
    )
    start = head(width, classes)
    works = [work(f"c{i}", count, width, classes, i) for i, count in enumerate(counts)]
    plan = {"proximal_mu": mu}
    together = train_heads(start, works, setting, 1, plan)
    backwards = train_heads(start, works[::-1], setting, 1, plan)[::-1]
    for item, a, b in zip(works, together, backwards, strict=True):
        alone = train_heads(start, [item], setting, 1, plan)[0]
        for name in start:
            assert torch.equal(a.delta[name], alone.delta[name]), (name, item.client)
            assert torch.equal(b.delta[name], alone.delta[name]), (name, item.client)


def test_a_hundred_clients_of_the_demos_shape_have_the_bits_of_one() -> None:
    torch.set_num_threads(1)
    setting, start = job(batch_size=10), head(384, 10)
    works = [work(f"c{i:03d}", 40 + i % 21, 384, 10, i) for i in range(100)]
    for item, update in zip(works, train_heads(start, works, setting, 1, {}), strict=True):
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
    from client.batches import permutations

    many = permutations([4] * 24_000, range(24_000))
    counts = np.unique(many, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(counts - 1000).max() < 5 * 1000**0.5


def test_splitmix64_gives_its_published_numbers() -> None:
    """The first outputs from seed 1234567, as listed with the reference implementation."""
    from client.batches import random_numbers

    found = random_numbers(np.array([1234567], dtype=np.uint64), 3)[0].tolist()
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
