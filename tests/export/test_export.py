"""Exported models, used by the programs that they are for: onnxruntime, transformers, peft, torch."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import atoll
from atoll.backbones.encoder import Model
from atoll.cli import export
from atoll.cli.main import run
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.trained import trained
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

pytestmark = pytest.mark.slow

RUNS: dict[str, tuple[str, str, dict[str, object]]] = {
    "text-classification": ("text-classification", "lora", {}),
    "segmentation": (
        "segmentation",
        "full",
        {"backbone": {"name": "atoll:small-segmenter", "weights": "random", "image_size": 64}},
    ),
    "batch norms": (
        "image-classification",
        "head",
        {"backbone": {"name": "torchvision:resnet18", "weights": "random", "image_size": 32}},
    ),
    "torchvision": ("segmentation", "full", {}),
    "question-answering": ("question-answering", "head", {}),
}
"""A task, a way of tuning and tables of its job by the run's name."""

TEXTS = ["good good a", "bad", "a b c d e bad", "good e"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind that can be exported, and one that can't."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("text-classification", "segmentation", "question-answering"):
        _run(folder, name)
    return folder


def _run(runs: Path, name: str) -> Path:
    """The run of that name, which is made once."""
    if not (runs / name).exists():
        task, method, tables = RUNS[name]
        (runs / name).mkdir()
        data = {"data": {**_data_of(task), "test_fraction": 0.2}}
        job = ready(job_of(task, method, **data, **tables), runs / name)
        simulate(job, runs / f"{name}-run", on_event=ignore_events, report=False)
    return runs / f"{name}-run"


def _data_of(task: str) -> dict[str, object]:
    classes = {
        "text-classification": {"classes": ("good", "bad")},
        "image-classification": {"classes": ("day", "night", "rain")},
    }
    return {"source": "written", **classes.get(task, {})}


def exported(runs: Path, name: str, form: str, *options: str) -> Path:
    """The exported folder; what no test changes is written once for all of them."""
    folder = runs / f"{name}-{form}"
    if not folder.exists():
        line = ["export", str(_run(runs, name)), "--format", form, "--out", str(folder), *options]
        assert run(line) == 0
    return folder


def as_trained(runs: Path, name: str) -> Model:
    learner, tensors = trained(_run(runs, name))
    return learner.filled(tensors)


def test_onnxruntime_says_what_the_model_says_with_the_tokenizer_beside_it(runs: Path) -> None:
    import onnxruntime
    from transformers import AutoTokenizer

    folder = exported(runs, "text-classification", "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    inputs = {one.name: tokens[one.name].astype(np.int64) for one in session.get_inputs()}
    model = as_trained(runs, "text-classification")
    with torch.inference_mode():
        expected = model(model.backbone.preprocess_and_collate(TEXTS)).numpy()
    assert np.allclose(session.run(None, inputs)[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["segmentation", "batch norms", "torchvision"])
def test_a_network_of_convolutions_is_written_for_any_number_of_pictures(runs: Path, name: str) -> None:
    import onnxruntime

    folder = exported(runs, name, "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    model = as_trained(runs, name)
    for count in (1, 5):
        shape = (count, *(int(n) for n in session.get_inputs()[0].shape[1:]))
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(count))
        with torch.inference_mode():
            expected = model({"pixel_values": pixels}).numpy()
        given = session.run(None, {"pixel_values": pixels.numpy()})[0]
        assert np.allclose(given, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["text-classification", "torchvision"])
def test_eight_bits_are_smaller_and_close(runs: Path, name: str) -> None:
    folder = exported(runs, name, "onnx-int8", "--max-drop", "0.1")
    told = json.loads((folder / "export.json").read_text())
    whole = exported(runs, name, "onnx")
    assert (folder / "model.onnx").stat().st_size < (whole / "model.onnx").stat().st_size
    assert [file.name for file in folder.glob("*.onnx*")] == ["model.onnx"]
    assert told["after"]["metrics"]["loss"] == pytest.approx(told["before"]["metrics"]["loss"], rel=0.1)


def test_transformers_and_peft_read_a_lora_run_with_equal_features(runs: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    folder = exported(runs, "text-classification", "huggingface")
    model = as_trained(runs, "text-classification")
    batch = model.backbone.preprocess_and_collate(TEXTS)
    with torch.inference_mode():
        expected, outputs = model.backbone(batch), model(batch)
        base = AutoModel.from_pretrained(runs / "text-classification" / "bert").eval()
        for network in (
            AutoModel.from_pretrained(folder).eval(),
            PeftModel.from_pretrained(base, folder / "adapter").eval(),
        ):
            states = network(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = (states * mask).sum(1) / mask.sum(1)
            assert torch.allclose(pooled, expected, atol=1e-5)
            head = load_file(folder / "head.safetensors")
            assert torch.allclose(pooled @ head["weight"].T + head["bias"], outputs, atol=1e-5)
        untouched = AutoModel.from_pretrained(runs / "text-classification" / "bert").eval()
        first = untouched(**batch).last_hidden_state[:, 0]
        assert not torch.allclose(first, network(**batch).last_hidden_state[:, 0], atol=1e-5)


def test_safetensors_hold_the_whole_model_without_factors(runs: Path) -> None:
    folder = exported(runs, "text-classification", "safetensors")
    tensors = load_file(folder / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    told = json.loads((folder / "export.json").read_text())
    assert told["before"]["metrics"] == pytest.approx(told["after"]["metrics"], rel=1e-5)
    line = ["export", str(runs / "text-classification-run"), "--format", "safetensors", "--out", str(folder)]
    assert run(line) == 2 and run([*line, "--force"]) == 0


def test_a_metric_that_falls_too_far_leaves_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = export.written

    def spoilt(*arguments: object) -> Model:
        model = written(*arguments)  # type: ignore[arg-type]
        for p in model.head.parameters():
            p.data.neg_()
        return model

    monkeypatch.setattr(export, "written", spoilt)
    folder = runs / "spoilt"
    line = ["export", str(runs / "segmentation-run"), "--format", "safetensors", "--out", str(folder)]
    assert run([*line, "--max-drop", "0.001"]) == 1
    said = capsys.readouterr().err
    assert "more than --max-drop 0.001 allows; nothing was written" in said
    assert not folder.exists() and not list(runs.glob(".spoilt*"))


@pytest.mark.parametrize(
    ("task", "form", "said"),
    [
        ("segmentation", "huggingface", "atoll:small-segmenter is no transformers network"),
        ("question-answering", "onnx", "not question-answering"),
        ("segmentation", "torchao-int8", "this backbone has none, try onnx-int8"),
        (
            "segmentation",
            "coreml",
            "expected one of safetensors, huggingface, gguf, onnx, onnx-int8, torchao-int8, found 'coreml'",
        ),
    ],
)
def test_what_can_not_be_is_one_line(
    runs: Path, task: str, form: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(runs / f"{task}-run"), "--format", form, "--out", str(runs / "none")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(said, line), line
    assert not (runs / "none").exists()


def test_torchao_and_transformers_alone_say_what_the_folder_says(runs: Path) -> None:
    from safetensors import safe_open
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = exported(runs, "text-classification", "torchao-int8", "--max-drop", "0.1")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state, _ = unflatten_tensor_state_dict(flat, file.metadata())
    prefix = "backbone.model."
    network = AutoModel.from_config(AutoConfig.from_pretrained(folder / "backbone"), add_pooling_layer=False)
    network.load_state_dict(
        {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, assign=True
    )
    assert network.encoder.layer[0].intermediate.dense.weight.qdata.dtype == torch.int8
    tokens = AutoTokenizer.from_pretrained(folder / "backbone")(TEXTS, padding=True, return_tensors="pt")
    ours = atoll.load_export(folder)
    with torch.inference_mode():
        states = network.eval()(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        pooled = (states * mask).sum(1) / mask.sum(1)
        outputs = pooled @ state["head.weight"].T + state["head.bias"]
        expected = ours.model(ours.model.backbone.preprocess_and_collate(TEXTS))
    assert torch.allclose(outputs, expected, atol=1e-5)
    whole = as_trained(runs, "text-classification")
    with torch.inference_mode():
        assert torch.allclose(expected, whole(whole.backbone.preprocess_and_collate(TEXTS)), atol=0.1)
    assert [answer["label"] for answer in ours.predict(TEXTS)] == [
        answer["label"] for answer in atoll.Run(runs / "text-classification-run").predict(TEXTS)
    ]


def test_a_torchao_folder_stands_alone_and_a_damaged_one_is_one_line(runs: Path, tmp_path: Path) -> None:
    folder = exported(runs, "segmentation", "safetensors")
    with pytest.raises(atoll.InputError, match="no folder that atoll export --format torchao-int8 wrote"):
        atoll.load_export(folder)
    made = exported(runs, "text-classification", "torchao-int8", "--max-drop", "0.1")
    copy = shutil.copytree(made, tmp_path / "copy")
    assert atoll.load_export(copy).predict(["good"])[0]["label"] in ("good", "bad")
    blob = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(blob[: len(blob) // 2])
    with pytest.raises(atoll.InputError, match="not a model that torchao can load"):
        atoll.load_export(copy)
