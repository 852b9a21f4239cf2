"""Pruned backbones: what is left out, that it stays out, the same bits everywhere, and in exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atoll.cli.main import run
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.tasks import task_named
from atoll.trained import trained
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

CLASSES = {"data": {"source": "written", "classes": ("good", "bad"), "test_fraction": 0.2}}
INNER = "backbone.model.encoder.layer.0.intermediate.dense.weight"


def texts(folder: Path, method: str = "full", kind: str = "magnitude", part: float = 0.5, **more: Any) -> Job:
    job = ready(job_of("text-classification", method, **CLASSES, **more), folder)
    return job.model_copy(
        update={"backbone": job.backbone.model_copy(update={"prune": part, "prune_kind": kind})}
    )


def learner_of(job: Job) -> Learner:
    return Learner.of(job, task_named(job.task.name), {"classes": ["good", "bad"]})


def sha(job: Job, out: Path, **how: Any) -> str:
    return str(simulate(job, out, on_event=ignore_events, report=False, **how).model_sha256)


def test_magnitude_leaves_out_the_smallest_weights_of_every_layer(tmp_path: Path) -> None:
    job = texts(tmp_path, part=0.3)
    whole = job.model_copy(
        update={"backbone": job.backbone.model_copy(update={"prune": None, "prune_kind": None})}
    )
    pruned, before = learner_of(job).model, learner_of(whole).model
    for name, weight in before.named_parameters():
        left = pruned.get_parameter(name)
        if name.endswith("dense.weight") or (".self." in name and name.endswith("weight")):
            # By hand: the smallest three tenths of the absolute values are zero, all others as they were.
            order = weight.detach().abs().flatten().argsort()
            count = round(0.3 * weight.numel())
            flat = left.detach().flatten()
            assert not flat[order[:count]].any()
            assert torch.equal(flat[order[count:]], weight.detach().flatten()[order[count:]])
        else:
            assert torch.equal(left, weight), name


def test_structured_takes_neurons_out_and_leaves_the_features_width(tmp_path: Path) -> None:
    job = texts(tmp_path, kind="structured")
    whole = job.model_copy(
        update={"backbone": job.backbone.model_copy(update={"prune": None, "prune_kind": None})}
    )
    pruned, before = learner_of(job).model, learner_of(whole).model
    width = before.get_parameter(INNER).shape[0]
    left = pruned.get_parameter(INNER)
    assert left.shape[0] == max(8, width // 2)
    assert pruned.backbone.model.config.intermediate_size == left.shape[0]  # type: ignore[union-attr]
    assert pruned.backbone.width == before.backbone.width
    # The rows that are left are rows that were there, in their order.
    places = [int((before.get_parameter(INNER) == row).all(1).nonzero()[0]) for row in left]
    assert places == sorted(places)
    batch = pruned.backbone.preprocess_and_collate(["good a", "bad"])
    assert pruned(batch).shape == before(batch).shape


def test_what_is_pruned_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    prints = {
        learner_of(texts(tmp_path, part=part, kind=kind)).backbone.fingerprint
        for part in (0.3, 0.5)
        for kind in ("magnitude", "structured")
    }
    assert len(prints) == 4
    assert learner_of(texts(tmp_path, part=0.3)).backbone.fingerprint in prints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind"),
    [("full", "magnitude"), ("last-k", "magnitude"), ("full", "structured"), ("lora", "structured")],
)
@pytest.mark.processes
def test_bits_are_the_same_everywhere_and_zeros_stay_zero(method: str, kind: str, tmp_path: Path) -> None:
    job = texts(tmp_path, method, kind)
    one, two, three = (
        sha(job, tmp_path / name, **how)
        for name, how in (("a", {}), ("b", {"engine": "loop"}), ("c", {"workers": 2}))
    )
    assert one == two == three
    check_zeros(job, tmp_path / "a")


def check_zeros(job: Job, out: Path) -> None:
    """What was left out before training is left out after it, and something else was learnt."""
    tensors, first = load_file(out / "model" / "model.safetensors"), learner_of(job).initial()
    assert tensors.keys() == first.keys()
    zeros = 0
    for name, before in first.items():
        if (
            job.backbone.pruning == "magnitude"
            and before.dim() == 2
            and name.startswith("backbone")
            and "embeddings" not in name
        ):
            out_before = before == 0
            assert not tensors[name][out_before].any(), name
            zeros += int(out_before.sum())
    assert any(not torch.equal(tensors[name], t) for name, t in first.items())
    if job.backbone.pruning == "magnitude":
        assert zeros > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "privacy",
    [
        {"unit": "example", "noise_multiplier": 0.5, "delta": 1e-3, "sampling_rate": 0.5},
        {"unit": "client", "noise_multiplier": 0.5, "delta": 1e-3},
    ],
)
def test_noise_leaves_zeros_zero(privacy: dict[str, Any], tmp_path: Path) -> None:
    job = texts(tmp_path, "full", privacy=privacy | {"seeded_noise": True})
    sha(job, tmp_path / "run")
    check_zeros(job, tmp_path / "run")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"backbone": {"prune_kind": "structured"}}, "prune_kind has no meaning without prune"),
        ({"backbone": {"prune": 1.0}}, "backbone.prune.*less than or equal to 0.95"),
        ({"backbone": {"prune": 0.5}, "tune": {"method": "lora"}}, "LoRA's factors would fill"),
    ],
)
def test_what_makes_no_sense_is_one_line(table: dict[str, Any], said: str) -> None:
    job = job_of("text-classification", "head").model_dump(mode="json")
    table = {key: {**job[key], **changed} for key, changed in table.items()}
    with pytest.raises(ConfigError, match=said):
        Job.parse(job | table, origin="test")


def test_networks_without_support_are_refused(tmp_path: Path) -> None:
    series = job_of("forecasting", "full")
    backbone = series.backbone.model_copy(update={"prune": 0.5, "prune_kind": "structured"})
    with pytest.raises(ConfigError, match="one encoder of texts or of images"):
        simulate(
            series.model_copy(update={"backbone": backbone}),
            tmp_path / "a",
            on_event=ignore_events,
            report=False,
        )
    with pytest.raises(ConfigError, match="engine cohort would fill"):
        sha(texts(tmp_path), tmp_path / "b", engine="cohort")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a backbone that isn't pruned."""
    folder = tmp_path_factory.mktemp("whole")
    plain = ready(job_of("text-classification", "full", **CLASSES), folder)
    simulate(plain, folder / "run", on_event=ignore_events, report=False)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "onnx", "huggingface", "torchao-int8"])
@pytest.mark.parametrize("kind", ["magnitude", "structured"])
def test_exports_are_pruned_and_say_what_the_network_says(
    form: str, kind: str, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    line = ["export", str(whole), "--format", form, "--prune", "0.5", "--prune-kind", kind]
    assert run([*line, "--max-drop", "1", "--out", str(folder)]) == 0
    told = json.loads((folder / "export.json").read_text())
    assert told["pruned"] == {"part": 0.5, "kind": kind}
    assert 0 <= told["after"]["metrics"]["accuracy"] <= 1
    if kind == "structured":
        assert told["after"]["megabytes"] < told["before"]["megabytes"] or form == "onnx"
    if form == "huggingface":
        from transformers import AutoModel

        network = AutoModel.from_pretrained(folder)
        weight = network.encoder.layer[0].intermediate.dense.weight
        assert weight.shape[0] == network.config.intermediate_size
        assert kind == "structured" or float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    if form == "torchao-int8":
        import atoll

        assert atoll.load_export(folder).predict(["good"])[0]["label"] in ("good", "bad")


@pytest.mark.slow
def test_convolutions_lose_channels_and_train_on(tmp_path: Path) -> None:
    job = ready(job_of("image-classification", "full"), tmp_path)
    backbone = job.backbone.model_copy(update={"prune": 0.5, "prune_kind": "structured"})
    small = job.model_copy(update={"backbone": backbone})
    assert sha(small, tmp_path / "a") == sha(small, tmp_path / "b", engine="loop")
    learner, tensors = trained(tmp_path / "a")
    whole = Learner.of(job, task_named(job.task.name), learner.data_info).initial()
    assert tensors.keys() == whole.keys()
    assert sum(t.numel() for t in tensors.values()) < 0.9 * sum(t.numel() for t in whole.values())


def test_a_layout_of_channels_last_leaves_out_the_same_weights_and_is_kept(tmp_path: Path) -> None:
    found = []
    for channels_last in (False, True):
        job = job_of("image-classification", "full", **CLASSES)
        backbone = {"prune": 0.5, "prune_kind": "magnitude", "channels_last": channels_last}
        found.append(
            learner_of(job.model_copy(update={"backbone": job.backbone.model_copy(update=backbone)})).model
        )
    plain, other = (dict(model.named_parameters()) for model in found)
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    name = next(name for name, p in other.items() if p.dim() == 4 and p.shape[2] == 3)
    assert plain[name].is_contiguous() and not other[name].is_contiguous()
    assert other[name].is_contiguous(memory_format=torch.channels_last)
