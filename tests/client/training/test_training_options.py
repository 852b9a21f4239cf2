"""Precision, accumulation and recomputed activations: what they change of an update, and what they don't."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import atoll.client.training.precision
from atoll.client.training.activation_checkpointing import activation_checkpointing
from atoll.client.training.local_sgd import parts_of, train_model
from atoll.client.training.precision import FIRST_SCALE, TYPES
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning import trainable
from atoll.learning.compatibility import check_fits
from atoll.learning.learner import Learner
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.backbones.test_backbones import tiny_bert
from tests.sim.engines.test_at_once import relative, text_job
from tests.support.small import grey_png_shard, image_job
from tests.support.task_data import ready
from tests.support.task_jobs import TABLES, job_of

FULL = {"lr": 0.05, "batch_size": 8}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learner_of(job: Job) -> Learner:
    return Learner.of(job, task_named(job.task.name), {"classes": ["a", "b"]})


def texts(folder: Path, train: dict[str, Any], **tables: Any) -> Job:
    return text_job(folder, train=FULL | train, **tables)


def changed(job: Job, **train: Any) -> Job:
    return job.model_copy(update={"train": job.train.model_copy(update=train)})


def shard_of(job: Job, count: int = 7, client: str = "client-0003") -> Shard:
    learner = learner_of(job)
    return learner.task.shard(Population.of(job).dataset(job, client), learner.data_info).select(range(count))


def update_of(job: Job, shard: Shard, round: int = 1, **plan: float) -> Update:
    learner = learner_of(job)
    return train_model(learner, learner.initial(), shard, job, client="c", round=round, plan=plan)


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_a_batchs_parts_are_even_but_for_the_last_one() -> None:
    job = image_job("squeezenet1_1", tune={"method": "full"}, train={"batch_size": 8, "accumulate": 4})
    assert [list(part) for part in parts_of(range(7), job)] == [[0, 1], [2, 3], [4, 5], [6]]
    assert [list(part) for part in parts_of(range(8), job)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [list(part) for part in parts_of(range(1), job)] == [[0]]


@pytest.mark.parametrize("count", [8, 7, 1])
def test_the_parts_of_a_batch_have_the_gradient_of_the_whole_whatever_its_size(
    tmp_path: Path, count: int
) -> None:
    """One step of plain SGD is the gradient times the learning rate; here taken by autograd at once."""
    job = texts(tmp_path, {"accumulate": 4, "lr": 0.5})
    shard, learner = shard_of(job, count), learner_of(job)
    trainable.load_values(learner.model, learner.initial())
    trainable.training_mode(learner.model)
    loss = learner.task.loss(
        learner.model(learner.collate(shard, range(count))), shard.targets_of(range(count))
    )
    loss.backward()  # type: ignore[no-untyped-call]
    expected = {n: -0.5 * p.grad for n, p in trainable.trainable(learner.model).items() if p.grad is not None}
    found = update_of(job, shard)
    assert float(flat(expected).norm()) > 1e-3
    assert relative(flat({n: found.delta[n] for n in expected}), flat(expected)) < 1e-5
    assert float(found.states["train_loss.sum"]) == pytest.approx(loss.item() * count, rel=1e-5)
    assert float(found.states["train_loss.count"]) == count


def test_parts_go_with_momentum_epochs_the_proximal_term_and_uneven_batches(tmp_path: Path) -> None:
    train = {"momentum": 0.9, "weight_decay": 0.01, "epochs": 3, "batch_size": 4}
    job = texts(tmp_path, train)
    shard = shard_of(job, 11)
    whole = update_of(job, shard, proximal_mu=0.3)
    parts = update_of(changed(job, accumulate=2), shard, proximal_mu=0.3)
    assert relative(flat(parts.delta), flat(whole.delta)) < 1e-5
    assert not torch.equal(flat(parts.delta), flat(whole.delta))


def test_a_batch_in_parts_is_augmented_as_the_whole_one() -> None:
    def update(accumulate: int) -> Update:
        train = {"augment": ["crop", "flip"], "batch_size": 4, "lr": 0.01, "accumulate": accumulate}
        return update_of(image_job("squeezenet1_1", train=train), grey_png_shard(7, classes=2))

    assert relative(flat(update(2).delta), flat(update(1).delta)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(TABLES) - {"object-detection", "survival"}))
def test_every_tasks_loss_is_a_mean_over_examples_so_that_parts_add_up(task: str, tmp_path: Path) -> None:
    base = ready(job_of(task, "full"), tmp_path)
    data_info = Population.of(base).roster(base).data_info[0]
    deltas = []
    for accumulate in (1, 2):
        train = {"optimizer": "sgd", "lr": 1e-4, "batch_size": 4, "epochs": 1, "accumulate": accumulate}
        job = base.model_copy(update={"train": base.train.model_copy(update=train)})
        learner = Learner.of(job, task_named(task), data_info)
        for module in learner.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # parts of a batch draw other masks than the whole one
        shard = learner.task.shard(Population.of(job).dataset(job, "client-0000"), data_info).select(range(7))
        update = train_model(learner, learner.initial(), shard, job, client="c", round=1, plan={})
        deltas.append(flat(update.delta))
    assert float(deltas[0].norm()) > 0
    assert relative(deltas[1], deltas[0]) < 1e-3  # a step of 1e-4 leaves float32 few digits


class Seen:
    """Notes the dtype of what every linear layer and convolution puts out."""

    def __init__(self, model: nn.Module) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.weights: set[torch.dtype] = set()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.dtypes.add(output.dtype)
        self.weights |= {p.dtype for p in module.parameters()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_lower_precision_computes_in_16_bits_and_keeps_weights_and_updates_in_32(
    tmp_path: Path, kind: str, precision: str
) -> None:
    if kind == "image":
        train = {"lr": 0.001, "batch_size": 8}
        plain = image_job("squeezenet1_1", tune={"method": "full"}, train=train)
        shard = grey_png_shard(7, classes=2)
    else:
        plain = texts(tmp_path, {})
        shard = shard_of(plain)
    job = changed(plain, precision=precision)
    learner = learner_of(job)
    seen = Seen(learner.model)
    low = train_model(learner, learner.initial(), shard, job, client="c", round=1, plan={})
    assert seen.dtypes == {TYPES[precision]} and seen.weights == {torch.float32}
    assert all(t.dtype == torch.float32 for t in low.delta.values())
    assert all(t.dtype == torch.float64 for t in low.states.values())
    full = update_of(plain, shard)
    # bf16 has 8 bits and fp16 11; a few layers deep that is a few percent, or per mille
    bound = {"bf16": 0.2, "fp16": 0.02}[precision]
    assert 0 < relative(flat(low.delta), flat(full.delta)) < bound
    seen.dtypes.clear()
    learner.evaluate(learner.initial(), shard)
    assert seen.dtypes == {torch.float32}  # what is measured is measured in full precision


def test_the_loss_is_scaled_so_that_small_gradients_do_not_vanish_and_the_update_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = texts(tmp_path, {"precision": "fp16"})
    shard = shard_of(job)
    found = {}
    for scale in (1.0, FIRST_SCALE):
        monkeypatch.setattr(atoll.client.training.precision, "FIRST_SCALE", scale)
        found[scale] = update_of(job, shard, proximal_mu=0.5)
    assert relative(flat(found[1.0].delta), flat(found[FIRST_SCALE].delta)) < 0.02


def test_a_step_that_overflows_is_left_out_and_the_next_round_starts_with_a_fresh_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atoll.client.training.precision, "FIRST_SCALE", 2.0**100)
    job = texts(tmp_path, {"precision": "fp16", "epochs": 3})
    shard, learner = shard_of(job), learner_of(job)
    rounds = [
        train_model(learner, learner.initial(), shard, job, client="c", round=1, plan={}) for _ in range(2)
    ]
    assert all(float(flat(update.delta).abs().max()) == 0 for update in rounds)
    monkeypatch.setattr(atoll.client.training.precision, "FIRST_SCALE", FIRST_SCALE)
    assert float(flat(update_of(job, shard).delta).abs().max()) > 0


def dropping(folder: Path) -> Job:
    """Full tuning of a BERT that drops out a lot."""
    path = tiny_bert(folder / "dropping", hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.3)
    backbone = {"name": str(path), "max_tokens": 16}
    return texts(folder, {"epochs": 2}, backbone=backbone, tune={"method": "full"})


def test_recomputed_activations_give_the_same_bits_dropout_included(tmp_path: Path) -> None:
    job = dropping(tmp_path)
    shard = shard_of(job)
    kept, other = update_of(job, shard), update_of(job, shard, round=2)
    again = update_of(changed(job, checkpoint_activations=True), shard)
    assert torch.equal(flat(again.delta), flat(kept.delta))
    assert not torch.equal(flat(other.delta), flat(kept.delta))  # there is dropout, drawn anew each round


@pytest.mark.parametrize(
    "network",
    ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in ("densenet121", "mobilenet_v2"))],
)
def test_layers_that_work_in_place_are_recomputed_from_what_they_saw(network: str) -> None:
    def update(again: bool) -> Update:
        train = {"lr": 0.001, "batch_size": 2, "checkpoint_activations": again}
        job = image_job(network, tune={"method": "full"}, train=train)
        return update_of(job, grey_png_shard(3, classes=2))

    assert torch.equal(flat(update(True).delta), flat(update(False).delta))


def test_recomputed_activations_are_not_kept_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    job = dropping(tmp_path)
    learner, shard = learner_of(job), shard_of(job)
    model = learner.model
    trainable.training_mode(model)

    def kept_bytes() -> int:
        sizes: list[int] = []

        def note(t: torch.Tensor) -> torch.Tensor:
            sizes.append(t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(learner.collate(shard, range(7)))
        return sum(sizes)

    without = kept_bytes()
    with activation_checkpointing(model):
        assert kept_bytes() < without / 4
    assert kept_bytes() == without
    with pytest.raises(KeyError), activation_checkpointing(model):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "accumulate": {"accumulate": 2},
    "all": {"precision": "bf16", "accumulate": 4, "checkpoint_activations": True},
}
TWO_STEPS = {"steps": 2}
"""In each round."""


Run = tuple[Job, RunResult]


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A job with some of these options, and its run in one process: two tests compare others with it."""

    @cache
    def of(name: str) -> Run:
        folder = tmp_path_factory.mktemp("options")
        few = {"clients": 3, "cohort": 2, "rounds": 2}
        job = texts(folder, TWO_STEPS | OPTIONS[name], federation=few)
        return job, simulate(job, folder / "inline", on_event=ignore_events, report=False)

    return of


@pytest.mark.parametrize(
    "name", ["all", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS if n != "all")]
)
def test_every_engine_gives_the_same_bits(tmp_path: Path, name: str, inline: Callable[[str], Run]) -> None:
    job, result = inline(name)
    other = simulate(job, tmp_path / "loop", engine="loop", on_event=ignore_events, report=False)
    assert result.model_sha256 == other.model_sha256
    assert result.rounds[0]["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16", "all"])
@pytest.mark.processes
def test_two_workers_give_the_same_bits(tmp_path: Path, name: str, inline: Callable[[str], Run]) -> None:
    job, result = inline(name)
    other = simulate(job, tmp_path / "two", workers=2, on_event=ignore_events, report=False)
    assert result.model_sha256 == other.model_sha256


def test_recomputing_changes_no_bit_of_a_run(tmp_path: Path) -> None:
    job = texts(tmp_path, TWO_STEPS, federation={"clients": 3, "rounds": 2})
    found = [
        simulate(
            changed(job, checkpoint_activations=again),
            tmp_path / str(again),
            on_event=ignore_events,
            report=False,
        )
        for again in (False, True)
    ]
    assert found[0].model_sha256 == found[1].model_sha256


def test_a_clients_promise_is_what_it_is_without(tmp_path: Path) -> None:
    """The clip comes behind training, whatever training is: claims and ledgers are the same."""
    noise = {"noise_multiplier": 1.0, "delta": 1e-2, "clipping_norm": 0.1, "seeded_noise": True}
    job = texts(
        tmp_path, TWO_STEPS, privacy={"unit": "client"} | noise, federation={"clients": 3, "rounds": 2},
        data={"source": str(tmp_path / "texts.csv"), "classes": ("a", "b")},
    )  # fmt: skip
    plain, saving = (
        simulate(setting, tmp_path / name, on_event=ignore_events, report=False)
        for name, setting in (("plain", job), ("saving", changed(job, **OPTIONS["all"])))
    )
    assert plain.privacy == saving.privacy
    assert plain.model_sha256 != saving.model_sha256


KEYS: dict[str, Any] = {"precision": "bf16", "accumulate": 2, "checkpoint_activations": True}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("where", ["client", "distributed"])
def test_under_example_level_privacy_each_is_refused_by_name(key: str, where: str) -> None:
    privacy = {
        "unit": "example",
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "sampling_rate": 0.5,
        "where": where,
    }
    with pytest.raises(
        ConfigError, match=rf"train\.{key}: an example's gradient is clipped as it is"
    ) as caught:
        image_job(
            "squeezenet1_1", tune={"method": "full"}, train={"batch_size": 8, key: KEYS[key]}, privacy=privacy
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_head_on_kept_features_and_engine_cohort_refuse_each_by_name(tmp_path: Path, key: str) -> None:
    train = {"batch_size": 8, key: KEYS[key]}
    head = image_job("squeezenet1_1", train=train)
    with pytest.raises(ConfigError, match=rf"train\.{key}: has no meaning for a head on kept features"):
        check_fits(head, task_named(head.task.name))
    views = image_job("squeezenet1_1", train=train | {"augment": ["flip"], "cached_views": 2})
    with pytest.raises(ConfigError, match=rf"train\.{key}: has no meaning for a head on kept features"):
        check_fits(views, task_named(views.task.name))
    full = image_job("squeezenet1_1", train=train, tune={"method": "full"})
    with pytest.raises(ConfigError, match=rf"train\.{key}: engine cohort trains clients at once"):
        simulate(full, tmp_path / "r", engine="cohort", on_event=ignore_events, report=False)
    assert not (tmp_path / "r").exists()


REFUSED: dict[str, tuple[Callable[[Path], Job], str]] = {
    "uneven": (
        lambda folder: image_job(
            "squeezenet1_1", tune={"method": "full"}, train={"batch_size": 8, "accumulate": 3}
        ),
        r"train.*accumulate: expected a divisor of batch_size = 8, found 3",
    ),
    "detection": (
        lambda folder: ready(
            job_of("object-detection", "full", train={"batch_size": 4, "accumulate": 2}), folder
        ),
        r"train\.accumulate: expected 1 for object-detection, found 2: a detector's losses are shared",
    ),
    "no blocks": (
        lambda folder: ready(job_of("forecasting", "full", train={"checkpoint_activations": True}), folder),
        r"train\.checkpoint_activations: this backbone has no blocks, expected false",
    ),
    "unknown": (
        lambda folder: image_job("squeezenet1_1", train={"precision": "fp8"}),
        r"train\.precision: expected 'fp32', 'bf16' or 'fp16'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    made, pattern = REFUSED[name]
    with pytest.raises(ConfigError, match=pattern) as caught:
        simulate(made(tmp_path), tmp_path / "r", on_event=ignore_events, report=False)
    assert "\n" not in str(caught.value)
