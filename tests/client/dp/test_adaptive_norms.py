"""Norms that follow a quantile of examples' gradients: a loop over examples, what it costs, and kills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from atoll.client.dp.adaptive_norms import (
    SCALE,
    AdaptiveNorm,
    ClippingScales,
    store_scales,
    with_stored_scales,
)
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.dp_sgd_model import train_privately
from atoll.client.dp.example_draws import example_numbers
from atoll.client.dp.poisson import private_training
from atoll.client.state.store import ClientStateStore
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.noise import RandomBits, seeded
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.requests import TrainRequest
from atoll.protocol.stacked_updates import stacked
from atoll.protocol.tensors import Tensors
from tests.client.dp.test_private_training import case
from tests.client.heads.test_heads import TORCH_LOSSES, Own, head, module, named, train_heads, work
from tests.client.heads.test_heads import job as head_job
from tests.privacy.runs.test_private_runs import EXAMPLE, SEEDED, cut_and_resumed, job, run
from tests.support.small import few_pictures

ADAPTIVE = {"clipping": "adaptive", "quantile": 0.6, "clipping_lr": 0.5}
QUANTILE, LR, DIVISOR, NORM = 0.6, 0.5, 6.0, 0.3
STEPS = 5


def bits(purpose: str) -> Any:
    def of(client: str) -> RandomBits:
        return seeded(stream_seed(3, purpose, client))

    return of


def rows_of_steps(client: str, numbers: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Every step has other rows, the third has none."""
    count = len(numbers)
    rows = [np.arange(step, count, 1 + step % 3) for step in range(STEPS)]
    return [row if step != 2 else np.array([], dtype=np.int64) for step, row in enumerate(rows)]


def private(noise: float = 0.0, count_deviation: float = 1e-9, **begin: float) -> DpSgd:
    adaptive = AdaptiveNorm(QUANTILE, LR, count_deviation, DIVISOR, bits("count"), begin)
    return DpSgd(NORM, noise, DIVISOR, bits("noise"), rows_of_steps, adaptive=adaptive)


def follow(norm: float, norms: list[float]) -> float:
    """Andrew et al. 2021, equation 2, with the expected batch in place of the drawn one."""
    within = sum(one <= norm for one in norms) - len(norms) / 2
    return norm * math.exp(-LR * (min(max(within / DIVISOR + 0.5, 0.0), 1.0) - QUANTILE))


def clipped_by_hand(gradients: list[Tensors], norm: float) -> tuple[Tensors, list[float]]:
    """(the sum of the gradients clipped to `norm`, their norms)."""
    norms = [float(torch.stack([g.square().sum() for g in one.values()]).sum().sqrt()) for one in gradients]
    names = gradients[0] if gradients else ()
    total = {
        name: sum(
            (g[name] * min(1.0, norm / size) for g, size in zip(gradients, norms, strict=True)),
            torch.zeros_like(gradients[0][name]),
        )
        for name in names
    }
    return total, norms


@pytest.mark.parametrize("hidden", [None, 5], ids=["one layer", "two layers"])
def test_heads_take_the_steps_of_a_loop_over_their_examples(hidden: int | None) -> None:
    """Clients of other sizes and with other scales from before, trained together."""
    start = head(13, 4, hidden)
    people = [work(f"c{i}", count, 13, 4, i) for i, count in enumerate((9, 1, 20))]
    begin = {"c1": 3.0, "c2": 0.2}
    setting = head_job(lr=0.5, batch_size=9)
    updates = train_heads(start, people, setting, 1, {}, per_example=private(**begin))
    for item, update in zip(people, updates, strict=True):
        expected, norm = heads_by_hand(start, item, NORM * begin.get(item.client, 1.0))
        assert float(update.states[SCALE]) == pytest.approx(norm / NORM, rel=1e-6)
        for name, delta in expected.items():
            torch.testing.assert_close(update.delta[name].double(), delta, rtol=2e-4, atol=2e-6)


def heads_by_hand(start: Tensors, item: Own, norm: float) -> tuple[Tensors, float]:
    model = module(start)
    for rows in rows_of_steps(item.client, np.arange(len(item.targets), dtype=np.uint64)):
        gradients = []
        for row in rows.tolist():
            model.zero_grad()
            loss = TORCH_LOSSES["softmax"](
                model(item.features[row : row + 1].double()), item.targets[row : row + 1]
            )
            loss.backward()
            gradients.append(
                {n: p.grad.clone() for n, p in named(start, model).items() if p.grad is not None}
            )
        total, norms = clipped_by_hand(gradients, norm)
        with torch.no_grad():
            for name, parameter in named(start, model).items():
                parameter -= 0.5 * total[name] / DIVISOR if total else 0.0
        norm = follow(norm, norms)
    return {n: p.detach() - start[n] for n, p in named(start, model).items()}, norm


@pytest.mark.parametrize("name", ["image, last block", "text, LoRA", "text, all, position embeddings"])
def test_whole_models_take_the_steps_of_a_loop_over_their_examples(name: str, tmp_path: Path) -> None:
    learner, shard = case(name, tmp_path, 40)
    for layer in learner.model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    start, how = learner.initial(), private(noise=1e-9, c=1.5)
    found = train_privately(learner, start, shard, how, client="c", round=1, plan={})
    expected, norm = model_by_hand(learner, start, shard, NORM * 1.5)
    assert float(found.states[SCALE]) == pytest.approx(norm / NORM, rel=1e-6)
    whole = torch.cat([expected[tensor].flatten().double() for tensor in expected])
    ours = torch.cat([found.delta[tensor].flatten().double() for tensor in expected])
    rounding = 3e-7 * float(torch.cat([start[tensor].flatten().double() for tensor in expected]).norm())
    assert float((ours - whole).norm()) < 1e-3 * float(whole.norm()) + rounding


def model_by_hand(learner: Learner, start: Tensors, shard: Shard, norm: float) -> tuple[Tensors, float]:
    model, lr = learner.model, learner.job.train.lr
    trainable.load_values(model, start)
    trainable.training_mode(model)
    parameters = trainable.trainable(model)
    for rows in rows_of_steps("c", example_numbers(shard.keys)):
        gradients = []
        for row in rows.tolist():
            model.zero_grad()
            outputs = model(learner.collate(shard, [row]))
            learner.task.loss(outputs, shard.targets[[row]]).backward()  # type: ignore[no-untyped-call]
            gradients.append({n: p.grad.double() for n, p in parameters.items() if p.grad is not None})
        total, norms = clipped_by_hand(gradients, norm)
        with torch.no_grad():
            for name, g in total.items():
                parameters[name] -= (lr * g / DIVISOR).to(parameters[name].dtype)
        norm = follow(norm, norms)
    return {n: p.detach() - start[n] for n, p in parameters.items()}, norm


def test_the_noise_of_a_step_is_that_of_its_norm() -> None:
    """z C times the scale over the divisor, in a step whose norm is another than the job's."""
    start, setting = head(40, 10), head_job(lr=1.0, batch_size=4)
    people = [work(f"c{i}", 4, 40, 10, i) for i in range(100)]
    begin = {item.client: 2.5 for item in people}

    def one_step(noise: float) -> DpSgd:
        adaptive = AdaptiveNorm(QUANTILE, LR, 1.0, DIVISOR, bits("count"), begin)
        draw = lambda client, numbers: [np.arange(len(numbers))]  # noqa: E731
        return DpSgd(NORM, noise, DIVISOR, bits("noise"), draw, adaptive=adaptive)

    quiet, loud = (
        train_heads(start, people, setting, 1, {}, per_example=one_step(noise)) for noise in (0.0, 2.0)
    )
    noise = torch.cat([
        (a.delta[n] - b.delta[n]).flatten() for a, b in zip(loud, quiet, strict=True) for n in start
    ]).double()  # fmt: skip
    expected = 2.0 * NORM * 2.5 / DIVISOR
    assert float(noise.std()) == pytest.approx(expected, rel=4 / (2 * len(noise)) ** 0.5)


def test_count_and_sum_together_cost_what_the_plan_charges() -> None:
    """Theorem 1 of the paper: an example moves the sum by C and the count by a half."""
    setting = job(EXAMPLE | ADAPTIVE | {"noise_multiplier": 1.0, "count_deviation": 0.8})
    dp_plan = dp_plan_of(setting, "example")
    assert dp_plan is not None and dp_plan.event.noise_multiplier == 1.0
    how = private_training(setting, dp_plan, 1, {})
    assert how.adaptive is not None and how.adaptive.count_deviation == 0.8
    together = (how.noise_multiplier**-2 + (0.5 / how.adaptive.count_deviation) ** 2) ** -0.5
    assert together == pytest.approx(1.0, rel=1e-12)
    usual = dp_plan_of(job(EXAMPLE | ADAPTIVE, train={"batch_size": 40}), "example")
    assert usual is not None and usual.count_deviation == 2.0  # a twentieth of the batch


@pytest.mark.parametrize(("where", "divisor"), [("client", 16.0), ("distributed", 1.0)])
def test_a_clients_sum_is_divided_at_the_client_unless_others_are_added_to_it(
    where: str, divisor: float
) -> None:
    setting = job(
        EXAMPLE | {"where": where, "steps": 1}, train={"batch_size": 16, "epochs": 1, "momentum": 0}
    )
    dp_plan = dp_plan_of(setting, "example")
    assert dp_plan is not None
    assert private_training(setting, dp_plan, 1, {}).divisor == divisor


def test_a_count_that_would_cost_too_much_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.count_deviation: expected more than 0\.5, half of"):
        dp_plan_of(job(EXAMPLE | ADAPTIVE | {"noise_multiplier": 1.0, "count_deviation": 0.5}), "example")


@pytest.mark.parametrize("start", [0.05, 20.0])
def test_a_norm_finds_the_quantile_from_both_sides(start: float) -> None:
    """Norms of gradients are 1, 2, …, 10 in each step, a batch of ten; noise as by default."""
    adaptive = AdaptiveNorm(0.5, 0.2, 1.0, 10.0, bits("count"))
    scales = ClippingScales(adaptive, ["a"], 400)
    late = []
    for step in range(400):
        norms = torch.arange(1.0, 11.0).unsqueeze(0)
        scales.count(norms <= start * scales.now[0], torch.ones(1, 10, dtype=torch.bool))
        scales.follow(step)
        late += [start * scales.now[0]] if step >= 200 else []
    assert 4.0 < float(np.median(late)) < 6.5


def test_a_scale_stays_within_its_bounds() -> None:
    scales = ClippingScales(AdaptiveNorm(0.5, 100.0, 1e-9, 1.0, bits("count")), ["a", "b"], 3)
    for step in range(3):
        scales.count(torch.tensor([[True], [False]]), torch.ones(2, 1, dtype=torch.bool))
        scales.follow(step)
    assert scales.now == [1e-6, 1e6]


@pytest.mark.parametrize("stacks", [True, False], ids=["stacked", "one by one"])
def test_a_scale_is_stored_at_the_client_and_leaves_it_never(stacks: bool) -> None:
    memory, how = ClientStateStore(), private().adaptive
    assert how is not None
    setting = job(EXAMPLE | ADAPTIVE)
    updates: Sequence[Update] = [
        Update(name, 1, {"w": torch.ones(2)}, 1, states={SCALE: torch.tensor(scale).double()})
        for name, scale in (("a", 0.5), ("b", 3.0))
    ]
    requests = [TrainRequest(setting.canonical, setting.hash, n, {}, {}, run="run") for n in (1, 2)]
    sent = list(store_scales(stacked(updates) if stacks else updates, requests[0], memory))
    assert [update.states for update in sent] == [{}, {}] and [u.client for u in sent] == ["a", "b"]
    assert with_stored_scales(how, ["a", "b", "c"], requests[1], memory).begin == {"a": 0.5, "b": 3.0}
    assert with_stored_scales(how, ["a", "b"], requests[0], memory).begin == {}  # the round again


NETWORK = {
    "tune": {"method": "last-k", "layers": 1},
    "data": few_pictures(30) | {"classes": ["0", "1", "2"]},
    "train": {"batch_size": 4},
}


@pytest.mark.parametrize("tables", [{}, NETWORK], ids=["heads", "models"])
def test_norms_are_kept_from_round_to_round_with_the_same_bits_everywhere(
    tmp_path: Path, tables: dict[str, Any]
) -> None:
    setting = job(EXAMPLE | ADAPTIVE | SEEDED | {"steps": 2}, **tables)
    whole = run(setting, tmp_path / "whole")
    assert run(setting, tmp_path / "loop", engine="loop").model_sha256 == whole.model_sha256
    assert cut_and_resumed(setting, tmp_path / "r").model_sha256 == whole.model_sha256
    fixed = EXAMPLE | SEEDED | {"steps": 2}
    plain = run(job(fixed, **tables), tmp_path / "plain")
    assert plain.model_sha256 != whole.model_sha256
    assert whole.privacy["epsilon"] == plain.privacy["epsilon"]
    for folder in (tmp_path / "whole").iterdir():
        if folder.suffix in (".json", ".jsonl", ".html"):
            assert SCALE not in folder.read_text()


def test_without_compressions_errors_norms_are_all_that_is_kept(tmp_path: Path) -> None:
    setting = job(
        EXAMPLE | ADAPTIVE | SEEDED,
        federation={"compression": "int8", "error_feedback": False},
    )
    result = run(setting, tmp_path / "run")
    assert [line["set_aside"] for line in result.rounds] == [{}] * 4
    assert cut_and_resumed(setting, tmp_path / "r").model_sha256 == result.model_sha256


@pytest.mark.parametrize(
    ("privacy", "tables", "why"),
    [
        ({"where": "distributed", "sampling_rate": 0.25}, {}, "whose sums are of one norm"),
        ({}, {"personal": {"keep": "mixture"}}, "with personal.keep"),
        ({}, {"federation": {"compression": "int8"}}, "with compression that feeds errors back"),
        ({}, {"tune": {"head_init": "ridge", "feature_norm": 1.0}}, "with tune.head_init"),
    ],
)
def test_what_has_no_norm_of_its_own_is_refused_by_name(
    privacy: dict[str, Any], tables: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^test: privacy\.clipping: expected 'fixed' .*{why}"):
        job(EXAMPLE | ADAPTIVE | privacy, **tables)
