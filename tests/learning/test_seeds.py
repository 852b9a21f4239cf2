"""Weights along directions that a seed draws: NumPy's loop in float64, autograd, runs with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.client.state.store import ClientStateStore
from atoll.client.training.learning_rates import StepRates
from atoll.client.training.local_sgd import train_model
from atoll.client.training.zeroth_order import BatchLoss, drawn_directions, step_along_directions
from atoll.errors import ConfigError
from atoll.export.huggingface import write_folder
from atoll.export.safetensors import make_plain, read_tensors, tensors_of, write_tensors
from atoll.job.job import Job
from atoll.learning import directions, trainable
from atoll.learning.learner import Learner
from atoll.protocol.random_streams import stream
from atoll.server.run.run_job import run_job
from atoll.sim.engines.engine import cached_test_set, check_engine
from atoll.sim.population.population import Population
from atoll.sim.search.space import default_space, has_meaning
from atoll.tasks import task_named
from atoll.trained import trained
from tests.strategies.test_lora_merge import Stopped, Stops, hashes, run
from tests.support.small import grey_png_shard, image_job
from tests.support.task_data import ready
from tests.support.task_jobs import TABLES, job_of

K = 40
CLIENT = {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-3, "seeded_noise": True}
EXAMPLE = {"unit": "example", "noise_multiplier": 0.5, "delta": 1e-5, "sampling_rate": 0.5}


class Small(nn.Module):
    """tanh(x U' + b) v: what NumPy can say in a line."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.u = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.b = nn.Parameter(torch.randn(4, generator=generator))
        self.v = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.u.T + self.b) @ self.v


SIZES = {"b": (4,), "u": (4, 3), "v": (4,)}
X = np.random.default_rng(0).normal(size=(6, 5, 3))
Y = np.random.default_rng(1).normal(size=(6, 5))
"""Six batches of five examples."""


def a_job(**tables: Any) -> Job:
    tune = {"method": "seeds", "seeds": K, "perturbation": 0.01} | tables.pop("tune", {})
    return image_job("squeezenet1_1", tune=tune, **tables)


def held(job: Job) -> Small:
    """The network in float64, with coefficients of its own."""
    model = Small().double()
    directions.hold(model, job.seed, K)
    model.double()
    directions.load(model)
    return model


def loss_of(model: Small) -> Callable[[int], BatchLoss]:
    def of_step(step: int) -> BatchLoss:
        x, y = torch.tensor(X[step]), torch.tensor(Y[step])
        return lambda: float(((model(x) - y) ** 2).mean())

    return of_step


def by_hand(job: Job, number: int) -> dict[str, NDArray[np.float64]]:
    """z_k: the stream's normal numbers, for one parameter after the other in order of names."""
    generator = stream(job.seed, "direction", number)
    return {
        name: torch.randn(size, generator=generator).numpy().astype(np.float64)
        for name, size in SIZES.items()
    }


def numpy_loss(w: dict[str, NDArray[np.float64]], step: int) -> float:
    return float(((np.tanh(X[step] @ w["u"].T + w["b"]) @ w["v"] - Y[step]) ** 2).mean())


@pytest.mark.parametrize("limit", [None, 0.5])
def test_local_steps_are_those_of_a_loop_written_in_numpy(limit: float | None) -> None:
    schedule = {"lr_schedule": "cosine", "lr_schedule_over": "steps"}
    job = a_job(train={"lr": 0.03, "batch_size": 5, "clip_norm": limit} | schedule)
    model = held(job)
    w = {name: p.detach().numpy().copy() for name, p in model.named_parameters() if name in SIZES}
    first = {name: value.copy() for name, value in w.items()}
    rates = StepRates.of(job, 2, [6], "cpu")
    losses = step_along_directions(model, job, rates, loss_of(model), client="one", round=2, steps=6)

    numbers = torch.randint(K, (6,), generator=stream(job.seed, "directions", 2, "one")).tolist()
    a, told, slopes = np.zeros(K), [], []
    for step, number in enumerate(numbers):
        z = by_hand(job, number)
        above, below = (numpy_loss({n: w[n] + far * z[n] for n in w}, step) for far in (0.01, -0.01))
        slope = (above - below) / 0.02
        slopes.append(abs(slope))
        slope = slope if limit is None else np.clip(slope, -limit, limit)
        change = 0.03 * (1 + np.cos(np.pi * step / 6)) / 2 * slope
        a[number] -= change
        w = {n: w[n] - change * z[n] for n in w}
        told.append((above + below) / 2)
    assert limit is None or min(slopes) < limit < max(slopes)
    assert losses == pytest.approx(told, rel=1e-12)
    found = model.get_parameter("coefficients").detach()
    np.testing.assert_allclose(found.numpy(), a, rtol=1e-9, atol=1e-13)

    # Where the client arrived is where the coefficients lead from the first weights.
    directions.load(model)
    for name, value in w.items():
        summed = first[name] + sum(a[k] * by_hand(job, k)[name] for k in range(K))
        np.testing.assert_allclose(value, summed, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(model.get_parameter(name).detach().numpy(), summed, rtol=1e-9, atol=1e-12)


def test_slopes_are_the_gradients_along_the_directions_and_their_mean_is_the_gradient() -> None:
    """By autograd: g = <grad L, z> but for eps^2, and E[g z] = grad L."""
    job = a_job(tune={"perturbation": 1e-4}, train={"lr": 1.0, "batch_size": 5})
    model, plain = held(job), Small().double()
    (((plain(torch.tensor(X[0])) - torch.tensor(Y[0])) ** 2).mean()).backward()
    gradient = {name: p.grad.numpy() for name, p in plain.named_parameters() if p.grad is not None}
    mean = {name: np.zeros(size) for name, size in SIZES.items()}
    coefficients, seen = model.get_parameter("coefficients"), set()
    for round in range(1, 400):
        model.load_state_dict(model.state_dict() | {"coefficients": torch.zeros(K)})
        step_along_directions(
            model, job, StepRates.of(job, 1, [1], "cpu"), loss_of(model), client="one", round=round, steps=1
        )
        [number] = coefficients.nonzero().flatten().tolist()
        slope, z = -float(coefficients.detach()[number]), by_hand(job, number)
        assert slope == pytest.approx(sum(float((gradient[n] * z[n]).sum()) for n in z), rel=1e-5, abs=1e-6)
        if number not in seen:
            seen.add(number)
            mean = {name: mean[name] + slope * z[name] / K for name in z}
    assert seen == set(range(K)), "each direction has its chance"
    one, other = (np.concatenate([d[name].ravel() for name in SIZES]) for d in (mean, gradient))
    # The estimate over K directions of d = 20 numbers is off by about sqrt(d / K) of the gradient's length.
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.6


def test_weights_have_the_same_bits_whatever_was_there_before_and_however_many_threads_draw() -> None:
    job = a_job()
    task = task_named(job.task.name)
    one, other = (Learner.of(job, task, {"classes": ["a", "b", "c"]}) for _ in range(2))
    first = one.initial()
    assert list(first) == ["coefficients"] and not first["coefficients"].any()
    generator = torch.Generator().manual_seed(0)
    wanted, before = (
        {"coefficients": 0.01 * torch.randn(K, generator=generator) * (torch.arange(K) % 3 > 0)} for _ in "ab"
    )
    start = {
        name: p.detach().double().numpy() for name, p in one.model.named_parameters() if name not in first
    }
    found = dict(one.filled(wanted).named_parameters())
    drawn = [dict(directions.directions_of(one.model).draw(k)) for k in range(K)]  # type: ignore[union-attr]
    for name, value in start.items():
        terms = (
            float(a) * z[name].double().numpy() for a, z in zip(wanted["coefficients"], drawn, strict=True)
        )
        np.testing.assert_allclose(found[name].detach().numpy(), value + sum(terms), rtol=1e-5, atol=1e-6)

    shard, threads = grey_png_shard(9, classes=3), torch.get_num_threads()
    other.filled(before)
    train_model(other, before, shard, job, client="one", round=1, plan={})
    torch.set_num_threads(3 if threads == 1 else 1)
    try:
        again = dict(other.filled(wanted).named_parameters())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_batch_in_parts_and_inputs_that_vary_give_what_they_give_whole() -> None:
    task, shard = task_named("image-classification"), grey_png_shard(10, classes=3)
    deltas = {}
    for parts in (1, 2):
        job = a_job(train={"lr": 1e-4, "batch_size": 4, "accumulate": parts})
        learner = Learner.of(job, task, {"classes": ["a", "b", "c"]})
        update = train_model(learner, learner.initial(), shard, job, client="one", round=1, plan={})
        deltas[parts] = update.delta["coefficients"]
        assert int(update.states["train_loss.count"]) == 10
    assert deltas[1].count_nonzero() == len(set(drawn_directions(job, 1, "one", 3)))
    assert torch.allclose(deltas[1], deltas[2], rtol=1e-3, atol=1e-5)

    job = a_job(train={"lr": 1e-4, "batch_size": 4, "augment": ["flip", "crop"]})
    learner = Learner.of(job, task, {"classes": ["a", "b", "c"]})
    start = learner.initial()
    one, other = (train_model(learner, start, shard, job, client="one", round=1, plan={}) for _ in "ab")
    assert torch.equal(one.delta["coefficients"], other.delta["coefficients"])
    assert not torch.equal(one.delta["coefficients"], deltas[1])


def test_pruned_weights_stay_zero_on_both_sides_and_after() -> None:
    job = a_job()
    job = job.model_copy(update={"backbone": job.backbone.model_copy(update={"prune": 0.5})})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    shard = grey_png_shard(9, classes=3)
    update = train_model(learner, learner.initial(), shard, job, client="one", round=1, plan={})
    model = learner.filled(update.delta)
    masked = [m for m in model.modules() if trainable.PRUNING_MASK in vars(m)]
    assert masked and update.delta["coefficients"].any()
    assert not any(m.weight[vars(m)[trainable.PRUNING_MASK] == 0].any() for m in masked)  # type: ignore[index]


def of_texts(folder: Path, **tables: Any) -> Job:
    table = {
        "data": {"source": "written", "classes": ("good", "bad"), "test_fraction": 0.2},
        "tune": {"method": "seeds"} | tables.pop("tune", {}),
        "federation": {"clients": 3, "rounds": 3} | tables.pop("federation", {}),
        "train": {"lr": 0.001, "batch_size": 8, "steps": 12} | tables.pop("train", {}),
    }
    return ready(job_of("text-classification", "seeds", **table, **tables), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, one client after the other, and its data."""
    folder = tmp_path_factory.mktemp("seeds")
    run(of_texts(folder), folder / "run", engine="loop")
    return folder


def test_the_loss_falls_and_messages_stay_under_18_kilobytes(folder: Path, tmp_path: Path) -> None:
    found = run(of_texts(folder), tmp_path / "run")
    losses = [line["loss"] for line in found.rounds]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
    learner, tensors = trained(tmp_path / "run")
    assert list(tensors) == ["coefficients"] and sum(p.numel() for p in learner.model.parameters()) > 20_000
    # Three clients train in each of three rounds, and measure each round's model with the next, and the last.
    assert found.bytes_up == 3 * 3 * 4 * 4096 < 3 * 3 * 18_000
    assert found.bytes_down == (3 + 1) * 3 * 4 * 4096
    assert hashes(found) == hashes(run(of_texts(folder), folder / "run", resume=True)), "loop and inline"


def test_a_run_that_was_stopped_has_the_same_bits(folder: Path, tmp_path: Path) -> None:
    job, out = of_texts(folder), tmp_path / "stopped"
    population = Population.of(job)
    stops = Stops.of(population, memory=ClientStateStore(out / "memory", of_one_run=True))
    with pytest.raises(Stopped):
        run_job(job, stops, out, cached_test_set(population, None), report=False)
    assert hashes(run(job, out, resume=True)) == hashes(run(job, folder / "run", resume=True))


@pytest.mark.processes
def test_worker_processes_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    job = of_texts(folder)
    assert hashes(run(job, tmp_path / "pool", workers=2)) == hashes(run(job, folder / "run", resume=True))


def test_what_is_exported_is_the_dense_network_and_knows_no_coefficients(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModel

    learner, tensors = trained(folder / "run")
    model = learner.filled(tensors)
    batch = model.backbone.preprocess_and_collate(["good a b", "bad bad c d"])
    with torch.inference_mode():
        expected, outputs = model.backbone.model(**batch).last_hidden_state.clone(), model(batch).clone()
    write_folder(model, learner.job, tmp_path)
    with torch.inference_mode():
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(**batch).last_hidden_state, expected)
    make_plain(model)
    assert not [name for name in tensors_of(model) if "coefficients" in name]
    write_tensors(model, tmp_path / "model.safetensors")
    again = trained(folder / "run")[0].model
    make_plain(again)
    read_tensors(again, tmp_path / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(again.eval()(batch), outputs)


@pytest.mark.parametrize(
    "tables",
    [
        {"federation": {"secure_aggregation": True}},
        {"federation": {"compression": "top-k", "compression_top_k": 0.5}},
        {"strategy": {"name": "fedadam"}},
        {"strategy": {"name": "fednova"}},
    ],
    ids=["secure", "compressed", "fedadam", "fednova"],
)
def test_coefficients_merge_as_any_tensor_does(tables: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    is_secure = "secure_aggregation" in tables.get("federation", {})
    if not is_secure:
        tables = {"tune": {"seeds": 512}} | tables
    found = run(of_texts(folder, **tables), tmp_path / "run")
    _, merged = trained(tmp_path / "run")
    assert len(set(hashes(found))) == 3
    if is_secure:
        _, plain = trained(folder / "run")
        assert torch.allclose(merged["coefficients"], plain["coefficients"], atol=1e-4)


def test_clients_are_promised_privacy(folder: Path, tmp_path: Path) -> None:
    for where in ("server", "distributed"):
        job = of_texts(
            folder,
            privacy=CLIENT | {"where": where, "clipping_norm": 0.01},
            federation={"rounds": 1},
            tune={"seeds": 512},
            train={"steps": 2},
        )
        found = run(job, tmp_path / where)
        _, tensors = trained(tmp_path / where)
        noise = 0.5 * 0.01 / 3
        assert found.privacy
        # The mean of three clipped vectors is 0.01 at most; the rest is noise of 512 numbers.
        assert float(tensors["coefficients"].std()) == pytest.approx(noise, rel=0.1)


QUICK = ("forecasting", "survival")


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=[] if t in QUICK else pytest.mark.matrix) for t in TABLES]
)
def test_every_task_has_directions_and_the_same_bits_in_another_engine(task: str, tmp_path: Path) -> None:
    tune = {"tune": {"method": "seeds", "seeds": 64}}
    train = {"train": {"lr": 1e-7, "batch_size": 16, "steps": 2}}
    few = {"data": {"source": "written"}} if task == "recommendation" else {}
    job = ready(job_of(task, "seeds", **tune, **train, **few), tmp_path)
    found, other = run(job, tmp_path / "one"), run(job, tmp_path / "loop", engine="loop")
    assert hashes(found) == hashes(other) and len(set(hashes(found))) == 2
    assert found.bytes_up == 2 * 2 * 4 * 64


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"train": {"optimizer": "adam"}}, "train.optimizer"),
        ({"train": {"momentum": 0.9}}, "train.momentum"),
        ({"train": {"weight_decay": 0.1}}, "train.weight_decay"),
        ({"train": {"layer_decay": 0.9}}, "train.layer_decay"),
        ({"train": {"dropout": 0.1}}, "train.dropout"),
        ({"train": {"checkpoint_activations": True}}, "train.checkpoint_activations"),
        ({"train": {"cached_states": "fp32"}}, "train.cached_states"),
        ({"train": {"precision": "fp16"}}, "train.precision"),
        ({"personal": {"keep": "mixture"}}, "personal.keep"),
        ({"personal": {"keep": "head"}}, "personal.keep"),
        ({"privacy": EXAMPLE}, "privacy.unit"),
        ({"tune": {"head_init": "ridge"}}, "tune.head_init"),
        ({"tune": {"rank": 2}}, "tune.rank"),
        ({"tune": {"method": "full"}}, "tune.seeds"),
        ({"tune": {"then": [{"method": "full", "after": 1}]}}, "tune.then"),
        ({"tune": {"method": "head", "seeds": None, "perturbation": None,
                   "then": [{"method": "seeds", "after": 1}]}}, "tune.then"),
        *(({"strategy": {"name": name}}, "strategy.name") for name in (
            "fedprox", "flwr:FedProx", "scaffold", "feddyn", "moon", "per-fedavg", "pfedme", "ifca", "qffl",
            "afl",
        )),
        ({"strategy": {"name": "signsgd"}, "federation": {"compression": "sign", "error_feedback": False}},
         "strategy.name"),
        ({"strategy": {"name": "fedasync"}, "federation": {"clients": 4, "cohort": 1, "concurrency": 2}},
         "strategy.name"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(tables: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        a_job(**tables)


def test_a_proximal_term_of_nothing_is_none() -> None:
    assert a_job(strategy={"name": "fedprox", "proximal_mu": 0.0}).tune.num_seeds == K


def test_a_search_varies_what_directions_have() -> None:
    method = {"tune": {"method": "seeds"}}
    assert all(has_meaning(f"tune.{key}", method) for key in ("seeds", "perturbation"))
    assert not has_meaning("tune.seeds", {"tune": {"method": "lora"}}) and not has_meaning(
        "tune.rank", method
    )
    [lr] = [key for key in default_space(a_job()).keys if key.key == "train.lr"]
    assert "0.01" in str(lr) and "0.3" not in str(lr)


def test_who_trains_by_gradients_alone_says_so() -> None:
    job = a_job()
    with pytest.raises(ConfigError, match=r"tune\.method: engine cohort"):
        check_engine(job, "cohort")
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    shard = grey_png_shard(4, classes=2)
    with pytest.raises(ConfigError, match="no proximal term"):
        train_model(learner, learner.initial(), shard, job, client="a", round=1, plan={"proximal_mu": 0.1})
