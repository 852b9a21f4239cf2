"""Sums by ghost norms, against examples taken one by one by autograd, and against gradients laid out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import nn
from transformers.pytorch_utils import Conv1D

from atoll.client.dp import dp_sgd_model, ghost_norms
from atoll.client.dp.adaptive_norms import SCALE
from atoll.client.dp.dp_sgd_model import clipped_sums, train_privately
from atoll.client.dp.example_draws import example_numbers
from atoll.client.dp.ghost_norms import OuterProducts, PassedBatch, ghost_passes, squared_norms_of
from atoll.client.dp.ghost_norms_fit import refuse_without_ghost_norms
from atoll.client.dp.private_examples import PrivateExamples
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.learning import trainable
from atoll.learning.learner import Learner
from atoll.server.run.run_job import validate_job
from tests.client.dp.test_adaptive_norms import private as adaptive
from tests.client.dp.test_private_training import CASES, by_hand, case, private
from tests.privacy.detectors import Detected
from tests.privacy.runs.neighbours import C, check_moved, learner_start, of_task, pictures, quiet
from tests.support.small import image_job

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

Vector = NDArray[np.float64]


class Words(nn.Module):
    """Words and places looked up, added, mapped: an embedding twice, and its weight as the last layer's."""

    def __init__(self, *, tied: bool = False, width: int = 40, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(60, width, padding_idx=padding)
        self.places = nn.Embedding(7, width)
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 60, bias=not tied)
        if tied:
            self.last.weight = self.words.weight

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        words = batch["words"]
        x = self.words(words) + self.places(torch.arange(words.shape[1])[None])
        x = self.norm(torch.tanh(self.inner(x)) + self.words(words.flip(1)))
        found: torch.Tensor = self.last(x).mean(1)
        return found


class Vectors(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = self.layers(batch["x"]).flatten(1)
        return found


class Loose(nn.Module):
    """A layer whose weight is also used where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x) @ self.inner.weight
        return y


class Steps(nn.Module):
    """One cell applied again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.own = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for place in range(x.shape[1]):
            state = torch.tanh(self.cell(state) + self.own(x[:, place]))
        return state


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp head": (lambda: Vectors(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 9)), (6,)),
    "no bias, frozen parts": (
        lambda: frozen(
            Vectors(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 30, bias=False), nn.Linear(30, 9)),
            "layers.0.weight", "layers.3.bias",
        ), (6,),
    ),
    "linear over many positions": (lambda: Vectors(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), (20, 6)),
    "linear over a grid": (lambda: Vectors(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 2)), (3, 2, 6)),
    "convolutions": (
        lambda: Vectors(
            nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 16), nn.Conv2d(16, 16, 3, stride=2),
            nn.Flatten(), nn.Linear(64, 9),
        ), (3, 8, 8),
    ),
    "layers of two kinds without a rule": (
        lambda: Vectors(nn.Linear(6, 6), Conv1D(9, 6), nn.InstanceNorm1d(4, affine=True)), (4, 6),
    ),
    "a cell again and again": (lambda: Vectors(Steps(), nn.Linear(6, 9)), (5, 6)),
}  # fmt: skip
TEXTS: dict[str, Callable[[], nn.Module]] = {
    "words": Words,
    "words with padding": lambda: Words(padding=0),
    "few and narrow words": lambda: Words(width=4),
    "one weight for words and outputs": lambda: Words(tied=True),
    "one weight, padding": lambda: Words(tied=True, padding=0),
    "words alone": lambda: frozen(
        Words(), "places.weight", "inner.weight", "inner.bias", "norm.weight", "norm.bias", "last.weight",
        "last.bias",
    ),
}  # fmt: skip


def made(name: str, rows: int = 5) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """(model, batch, targets); the examples' gradients have norms that are far from each other."""
    torch.manual_seed(3)
    if name in TEXTS:
        model, words = TEXTS[name](), torch.randint(0, 6, (rows, 6))
        words[0] = 2  # one word, again and again
        return model, {"words": words}, torch.arange(rows) * 7
    make, shape = MODELS[name]
    model = make()
    x = torch.randn(rows, *shape) * torch.logspace(-2, 1, rows).view(-1, *[1] * len(shape))
    with torch.no_grad():
        outputs = model({"x": x}).shape[1]
    return model, {"x": x}, torch.arange(rows) % outputs


def one_by_one(model: nn.Module, batch: dict[str, torch.Tensor], targets: torch.Tensor) -> Vector:
    """Each example's gradient by autograd on a batch of one, [rows, numbers], by names in order."""
    parameters, rows = trainable.trainable(model), []  # type: ignore[arg-type]
    for row in range(len(targets)):
        outputs = model({name: t[row : row + 1] for name, t in batch.items()})
        loss = nn.functional.cross_entropy(outputs, targets[row : row + 1])
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        by_name = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }
        rows.append(flat(by_name))
    return np.stack(rows)


def flat(tensors: Any) -> Vector:
    return torch.cat([tensors[name].detach().flatten().double() for name in sorted(tensors)]).numpy()


def clipped_by_hand(each: Vector, norm: float) -> Vector:
    """The sum of the rows, each clipped to this norm; rows that aren't finite count as zero."""
    norms = np.linalg.norm(each, axis=1)
    sound = np.isfinite(norms)
    factors = np.minimum(1, norm * (1 - 1e-5) / norms[sound])
    total: Vector = factors @ each[sound]
    return total


def ghost_sum(model: Any, batch: Any, targets: torch.Tensor, norm: float) -> Vector:
    model.train()
    how = dp_sgd_model.DpSgd(norm, 1.0, 1.0, lambda client: None)  # type: ignore[arg-type,return-value]
    with ghost_passes(model, nn.functional.cross_entropy) as passes:
        passed = passes(batch, targets)
        factors = dp_sgd_model._clipped_norms(passed.squared_norms().sqrt(), how, 1.0)
        return flat(passed.sum_of(factors))


def apart(found: Vector, expected: Vector) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", [*MODELS, *TEXTS])
def test_a_clipped_sum_is_that_of_examples_taken_one_by_one(name: str) -> None:
    model, batch, targets = made(name)
    each = one_by_one(model, batch, targets)
    norm = float(np.median(np.linalg.norm(each, axis=1)))  # some are clipped, some aren't
    assert apart(ghost_sum(model, batch, targets, norm), clipped_by_hand(each, norm)) < 1e-6


@pytest.mark.parametrize("name", [*MODELS, *TEXTS])
def test_each_norm_is_that_of_the_examples_gradient(name: str) -> None:
    model, batch, targets = made(name)
    model.train()
    with ghost_passes(model, nn.functional.cross_entropy) as passes:
        passed = passes(batch, targets)
    norms = passed.squared_norms().sqrt().numpy()
    np.testing.assert_allclose(norms, np.linalg.norm(one_by_one(model, batch, targets), axis=1), rtol=2e-6)


def test_large_layers_are_never_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OuterProducts, "sample", lambda self: pytest.fail("laid out"))
    for name in ("mlp head", "words", "one weight for words and outputs", "linear over a grid"):
        model, batch, targets = made(name)
        ghost_sum(model, batch, targets, 1.0)


def test_what_is_in_memory_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("words", "one weight for words and outputs", "linear over a grid"):
        whole = ghost_sum(*made(name), 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(ghost_norms, "NUMBERS_AT_ONCE", 1)
            assert apart(ghost_sum(*made(name), 1.0), whole) < 1e-14


def test_a_pass_leaves_the_model_as_it_was() -> None:
    for name in ("convolutions", "words"):
        model, batch, targets = made(name)
        before = {name: sorted(vars(module)) for name, module in model.named_modules()}
        ghost_sum(model, batch, targets, 1.0)
        assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
        assert all(p.grad is None and set(vars(p)) == set() for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["mlp head", "convolutions", "linear over a grid", "a cell again and again"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_an_example_without_a_finite_gradient_counts_as_zero(name: str, value: float) -> None:
    model, batch, targets = made(name)
    batch["x"][2].flatten()[0] = value
    each = one_by_one(model, batch, targets)
    found = ghost_sum(model, batch, targets, 1.0)
    assert np.isfinite(found).all()
    if not np.isfinite(each[2]).all():
        assert apart(found, clipped_by_hand(each, 1.0)) < 1e-6
    others = clipped_by_hand(np.delete(each, 2, axis=0), 1.0)
    assert float(np.linalg.norm(found - others)) <= 1 + 1e-6


def test_a_norm_covers_what_cancels() -> None:
    """Positions of huge and opposite gradients: what is summed is no longer than the norm says."""
    torch.manual_seed(0)
    layer = nn.Linear(50, 40, bias=False)
    for size, difference in ((1.0, 1e-3), (1e4, 1e-3), (1.0, 2e-7), (1e8, 2e-7)):
        inputs = torch.randn(3, 6, 50) * size
        backprops = torch.randn(3, 6, 40) * size
        inputs[:, 3:], backprops[:, 3:] = inputs[:, :3], -backprops[:, :3] * (1 + difference)
        term = OuterProducts(layer, inputs, backprops)
        norms = squared_norms_of([term]).sqrt()
        total = torch.zeros(3, 40, 50, dtype=torch.float64)
        for row in range(3):
            term.add_to(total[row], torch.eye(3, dtype=torch.float64)[row])
        exact = np.einsum("ntp,ntd->npd", backprops.numpy().astype(np.longdouble), inputs.numpy())
        true = np.sqrt((exact**2).sum((1, 2))).astype(np.float64)
        assert (norms.numpy() >= true).all() and (norms.numpy() >= total.flatten(1).norm(dim=1).numpy()).all()
        assert difference < 1e-6 or (norms.numpy() <= true * (1 + 1e-6)).all()


# What a client does


def with_ghost_norms(learner: Learner) -> Learner:
    privacy = learner.job.privacy.model_copy(update={"ghost_norms": True})
    job = learner.job.model_copy(update={"privacy": privacy})
    return Learner.of(job, learner.task, learner.data_info)


def sum_of(learner: Learner, shard: Shard, norm: float = 0.5) -> Vector:
    trainable.load_values(learner.model, learner.initial())
    trainable.training_mode(learner.model)
    numbers = example_numbers(shard.keys)
    with clipped_sums(learner, shard) as summed:
        examples = PrivateExamples(learner, shard, numbers, (1, "c", 0))
        return flat(summed(examples, np.arange(len(shard)), private(norm), None))


HOOKED = [name for name in CASES if name != "image, all, batch norm"]


@pytest.mark.parametrize("name", HOOKED)
def test_a_client_has_the_same_sum_as_with_gradients_laid_out(name: str, tmp_path: Path) -> None:
    """With dropout as it is: both draw the same for an example. 33 examples pass in two parts, one alone."""
    learner, shard = case(name, tmp_path, 33)
    norms = (0.5, 1e3)
    laid_out = [sum_of(learner, shard, norm) for norm in norms]
    ghost = with_ghost_norms(learner)
    for norm, expected in zip(norms, laid_out, strict=True):
        assert apart(sum_of(ghost, shard, norm), expected) < 1e-6


@pytest.mark.parametrize("name", ["image, last block", "text, all, position embeddings"])
def test_a_clients_update_is_that_of_examples_taken_one_by_one(name: str, tmp_path: Path) -> None:
    learner, shard = case(name, tmp_path, 6)
    learner = with_ghost_norms(learner)
    for module in learner.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start, how = learner.initial(), private()
    found = train_privately(learner, start, shard, how, client="c", round=1, plan={})
    expected, norms = by_hand(learner, start, shard, how)
    assert max(norms) > how.clipping_norm and expected.keys() == found.delta.keys()
    rounding = 3e-7 * float(np.linalg.norm(flat(start)))
    gap = float(np.linalg.norm(flat(found.delta) - flat(expected)))
    assert gap < 1e-3 * float(np.linalg.norm(flat(expected))) + rounding


def test_norms_that_follow_a_quantile_are_those_of_gradients_laid_out() -> None:
    """Five steps, of other rows each, one of none; an example alone passes twice and counts once."""
    learner, shard = pictures(train={"lr": 0.5, "batch_size": 1, "dropout": 0.5})
    found = [
        train_privately(
            one, learner_start(learner), shard.select(range(7)), adaptive(1e-9), client="c", round=1, plan={}
        )
        for one in (learner, with_ghost_norms(learner))
    ]
    scales = [float(update.states[SCALE]) for update in found]
    assert scales[0] == scales[1] != 1.0
    assert apart(flat(found[1].delta), flat(found[0].delta)) < 1e-5


# Where it can't be had


def test_a_network_with_layers_that_hooks_do_not_see_is_refused_by_the_key(tmp_path: Path) -> None:
    learner, shard = case("image, all, batch norm", tmp_path, 3)
    learner = with_ghost_norms(learner)
    with pytest.raises(ConfigError, match=r"^privacy\.ghost_norms: .*mobilenet_v2.*buffers"):
        train_privately(learner, learner.initial(), shard, private(), client="c", round=1, plan={})


def test_a_refusal_tells_no_number_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the server: lengths of texts and norms of gradients are nobody's to know."""
    learner, shard = case("text, LoRA", tmp_path, 3)
    learner = with_ghost_norms(learner)
    double = ghost_norms.PassedBatch.squared_norms
    monkeypatch.setattr(ghost_norms.PassedBatch, "squared_norms", lambda passed: 2 * double(passed))
    with pytest.raises(ConfigError) as wrong:
        dp_sgd_model.hooks_suffice_for(learner, shard)
    monkeypatch.setattr(
        ghost_norms.PassedBatch, "squared_norms", lambda passed: torch.zeros(3) + torch.zeros(17)
    )
    with pytest.raises(ConfigError) as failed:
        dp_sgd_model.hooks_suffice_for(learner, shard)
    for error in (wrong, failed):
        assert not re.search(r"\d", str(error.value).replace(learner.backbone.name, ""))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("middle", "fault"),
    [
        (Loose(), r"the gradients of head\.middle\.inner\.weight don't add up to the batch's"),
        (nn.LSTM(6, 6, batch_first=True), "a layer failed: TypeError"),
    ],
    ids=["loose", "lstm"],
)
def test_a_parameter_that_hooks_see_in_part_is_refused_by_the_key(middle: nn.Module, fault: str) -> None:
    learner, shard = pictures(tune={"method": "full"})
    learner = with_ghost_norms(learner)
    start, plain = learner.initial(), learner.model.head

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.middle = plain, middle

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.middle(x[:, :6])
            x = x[0] if isinstance(x, tuple) else x
            found: torch.Tensor = x[:, :3]
            return found

    learner.model.head = Head()
    assert start
    with pytest.raises(ConfigError, match=rf"^privacy\.ghost_norms: hooks can't tell .* \({fault}\)"):
        dp_sgd_model.hooks_suffice_for(learner, shard)


def test_one_example_is_enough_to_look_at(tmp_path: Path) -> None:
    learner, shard = case("text, LoRA", tmp_path, 1)
    refuse_without_ghost_norms(with_ghost_norms(learner), shard)


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({}, "privacy.ghost_norms has no meaning with unit = 'none'"),
        (
            {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3},
            "privacy.ghost_norms has no meaning with unit = 'client'",
        ),
    ],
    ids=["no promise", "clients"],
)
def test_without_a_promise_to_examples_it_is_refused(tables: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace(".", r"\.")):
        image_job("squeezenet1_1", tune={"method": "full"}, privacy=tables | {"ghost_norms": True})


def test_heads_on_features_refuse_it() -> None:
    learner, _ = pictures(tune={"method": "head"}, train={"lr": 1.0})
    job = with_ghost_norms(learner).job
    with pytest.raises(ConfigError, match=r"privacy\.ghost_norms has no meaning with tune\.method = 'head'"):
        validate_job(job)
    validate_job(with_ghost_norms(pictures(tune={"method": "full"})[0]).job)


# Bugs that must be found


def ghost_texts(folder: Path) -> tuple[Learner, Shard]:
    learner, shard = of_task(
        "text-classification", "full", folder, 24, train={"lr": 1.0, "batch_size": 1, "dropout": 0.5}
    )
    return with_ghost_norms(learner), shard


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Learner, Shard]:
    torch.set_num_threads(1)
    return ghost_texts(tmp_path_factory.mktemp("texts"))


def test_one_example_moves_the_sum_by_the_clipping_norm_at_most(texts: tuple[Learner, Shard]) -> None:
    check_moved(*texts)
    learner, shard = texts
    total = sum_of(learner, shard, C)
    assert float(np.linalg.norm(total)) > C, "more than one example's"
    assert quiet(learner.job).clipping_norm == C and learner_start(learner)


def not_applied(norms: torch.Tensor, private: Any, scale: float) -> torch.Tensor:
    return torch.ones_like(norms)


def one_layer_left_out(original: Any, passed: PassedBatch) -> torch.Tensor:
    largest = max(passed.terms, key=lambda name: float(ghost_norms._squared_norms(passed.terms[name]).sum()))
    found: torch.Tensor = original(
        PassedBatch(passed.parameters, {n: t for n, t in passed.terms.items() if n != largest})
    )
    return found


def of_another_example(original: Any, passed: PassedBatch) -> torch.Tensor:
    found: torch.Tensor = original(passed).roll(1)
    return found


def of_the_batch_before(original: Any, passed: PassedBatch, kept: list[torch.Tensor]) -> torch.Tensor:
    kept.append(original(passed))
    before = kept[-2] if len(kept) > 1 and len(kept[-2]) == len(kept[-1]) else kept[-1] / 100
    return before


PLANTS: dict[str, tuple[Any, str, Any]] = {
    "the factor is not applied": (dp_sgd_model, "_clipped_norms", not_applied),
    "the norm of one layer is left out": (PassedBatch, "squared_norms", one_layer_left_out),
    "each norm is another example's": (PassedBatch, "squared_norms", of_another_example),
    "the norms are another batch's": (PassedBatch, "squared_norms", partial(of_the_batch_before, kept=[])),
    "a layer's parts are another example's": (
        ghost_norms.OuterProducts, "exact",
        lambda original, term, rows: original(term, rows.roll(1) if len(rows) > 1 else rows),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found_by_the_first_step_or_by_neighbours(
    name: str, texts: tuple[Learner, Shard], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, attribute, plant = PLANTS[name]
    learner, shard = texts
    original = getattr(place, attribute)
    planted = plant if plant is not_applied else lambda *given: plant(original, *given)
    monkeypatch.setattr(place, attribute, planted)
    dp_sgd_model._in_use.clear()
    if plant is not not_applied:
        with pytest.raises(ConfigError, match=r"^privacy\.ghost_norms: "):
            check_moved(learner, shard)
        monkeypatch.setattr(dp_sgd_model, "refuse_without_ghost_norms", lambda *given: None)
        monkeypatch.setattr(dp_sgd_model, "refuse_mixed_examples", lambda *given, **more: None)
    dp_sgd_model._in_use.clear()
    with pytest.raises(Detected, match="moves the sum"):
        check_moved(learner, shard)
    dp_sgd_model._in_use.clear()


# What of Opacus' own ghost norms is not used, and why


def opacus_norms(model: nn.Module, batch: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    hooked = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", strict=False)
    nn.functional.cross_entropy(hooked(batch), targets, reduction="sum").backward()
    return hooked.get_norm_sample()


def test_opacus_has_no_norm_for_a_linear_layer_on_a_grid_and_for_tied_weights() -> None:
    with pytest.raises(AttributeError, match="_norm_sample"):
        opacus_norms(*made("linear over a grid"))
    with pytest.raises(NotImplementedError, match="Parameter tying"):
        opacus_norms(*made("one weight for words and outputs"))


def test_opacus_keeps_the_norm_of_the_batch_before_where_a_layer_is_not_reached() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model.forward = lambda given: model[given[0]](given[1])  # type: ignore[method-assign]
    hooked: Any = GradSampleModuleFastGradientClipping(model, loss_reduction="sum")
    targets = torch.zeros(4, dtype=torch.long)
    for name, scale in (("a", 100.0), ("b", 1.0)):  # the second batch reaches only b
        nn.functional.cross_entropy(
            hooked((name, scale * torch.randn(4, 3))), targets, reduction="sum"
        ).backward()
    norms = hooked.get_norm_sample()
    own = torch.stack([p._norm_sample for p in model["b"].parameters()]).norm(dim=0)  # type: ignore[attr-defined]
    assert bool((norms > 2 * own).any())
