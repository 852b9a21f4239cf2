"""Every torchvision classifier becomes an encoder; weights are found in order or asked for in one line."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from atoll.backbones.checkpoint import load_weights
from atoll.backbones.encoder import Encoder, in_layout
from atoll.backbones.extract import BATCH, extract
from atoll.backbones.resolve import resolve
from atoll.backbones.text import load_text_encoder
from atoll.backbones.torchvision_models import (
    TorchvisionKind,
    has_batch_norm,
    published_weights,
    torchvision_names,
)
from atoll.backbones.vision import load_vision_encoder, torchvision_trunk, torchvision_width
from atoll.errors import ConfigError, WeightsError
from atoll.job.job import BackboneSection
from atoll.learning.compatibility import check_fits
from atoll.learning.compiled import CompiledEncoder
from atoll.learning.features import cache_key
from atoll.learning.learner import Learner
from atoll.tasks import task_named
from tests.support.processes import python
from tests.support.small import grey_png_shard, image_job

SMALL = [
    "alexnet", "squeezenet1_0", "squeezenet1_1", "resnet18", "shufflenet_v2_x0_5", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet0_5", "efficientnet_b0", "regnet_y_400mf", "googlenet", "densenet121",
]  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_torchvision_network_gives_one_feature_vector_an_image(name: str) -> None:
    trunk, width = torchvision_trunk(name, 0)
    trunk.eval()
    with torch.inference_mode():
        features = trunk(torch.zeros(2, 3, 64, 64)).flatten(1)
    assert features.shape == (2, width)
    assert torchvision_width(name) == width
    assert has_batch_norm(name) == normalises_batches(trunk)


@pytest.mark.parametrize("kind", get_args(TorchvisionKind))
def test_models_and_weights_read_from_torchvisions_source_are_what_it_says_when_imported(
    kind: TorchvisionKind,
) -> None:
    module = models if kind == "classification" else getattr(models, kind)
    others = ("quantized_", "maskrcnn", "keypointrcnn")
    assert torchvision_names(kind) == [
        n for n in models.list_models(module=module) if not n.startswith(others)
    ]
    for name in torchvision_names(kind):
        weights, found = models.get_model_weights(name), published_weights(name)
        assert found.urls == {entry.name: entry.url for entry in weights}
        assert found.default == weights.DEFAULT.url


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(torchvision_names()) - set(SMALL)))
def test_every_other_torchvision_classifier_too(name: str) -> None:
    """On `meta`, where nothing is computed; a few initialise in a way that needs real tensors."""
    try:
        with torch.device("meta"):
            trunk, width = torchvision_trunk(name, 0)
            size = 299 if name == "inception_v3" else 256 if name.startswith(("swin_v2",)) else 224
            images = torch.zeros(2, 3, size, size)
            size_of = getattr(trunk, "image_size", size)
            features = trunk.eval()(images if size_of == size else torch.zeros(2, 3, size_of, size_of))
    except NotImplementedError:
        trunk, width = torchvision_trunk(name, 0)
        features = trunk.eval()(torch.zeros(2, 3, 224, 224))
    assert features.flatten(1).shape == (2, width)
    assert has_batch_norm(name) == normalises_batches(trunk)


def normalises_batches(network: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5"])
def test_random_features_of_a_network_with_batch_norms_neither_fade_nor_explode(name: str) -> None:
    """Uncalibrated, MobileNetV2's are 1e-9 and tell no picture from another."""
    job = image_job(name, tune={"method": "full"})
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["a", "b", "c"]})
    shard = grey_png_shard(6, classes=3)
    features = learner.features.plain(shard)
    size = float(features.square().mean().sqrt())
    assert 0.1 < size < 10 and float(features.std(dim=0).mean()) > 0.02 * size
    loss = learner.compute(learner.evaluate(learner.initial(), shard))["loss"]
    assert loss is not None and loss < 5


def test_pictures_too_small_for_a_random_network_are_named() -> None:
    section = BackboneSection(name="torchvision:inception_v3", weights="random", image_size=32)
    with pytest.raises(ConfigError, match=r"image_size: torchvision:inception_v3 .* 32 x 32.*own is 299"):
        load_vision_encoder(resolve(section, 1), section, 1)


def test_random_weights_come_from_the_seed_and_only_when_asked_for() -> None:
    section = BackboneSection(name="torchvision:squeezenet1_1", weights="random", image_size=32)
    a, b, c = (load_vision_encoder(resolve(section, s), section, s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)
    assert resolve(section, 1).origin == "random, seed 1"
    assert resolve(section, 1).fingerprint != resolve(section, 2).fingerprint


def test_weights_that_are_nowhere_are_asked_for_in_one_line_without_a_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # row 52
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        resolve(BackboneSection(name="torchvision:resnet50", offline=True), 1)
    line = str(caught.value)
    assert "looked in" in line and str(tmp_path) in line and "offline" in line and "put resnet50-" in line
    assert "\n" not in line and not any(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("torchvision:resnet5O", "did you mean 'resnet50'"),  # row 51
        ("keras:resnet50", "unknown kind 'keras'"),
        ("/nowhere", "no config.json"),
        ("hf:no/such-model", "no weights found; looked in transformers' cache; offline"),
    ],
)
def test_an_unknown_backbone_is_answered_in_one_line(name: str, pattern: str) -> None:
    with pytest.raises(WeightsError, match=pattern) as caught:
        resolve(BackboneSection(name=name, offline=True), 1)
    assert "\n" not in str(caught.value)


def test_the_librarys_own_cache_comes_before_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trunk, _ = torchvision_trunk("squeezenet1_1", 3)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(trunk.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    section = BackboneSection(name="torchvision:squeezenet1_1", offline=True, image_size=32)
    found = resolve(section, 1)
    assert found.origin.startswith("torchvision's cache")
    loaded = load_vision_encoder(found, section, 1).model.state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in trunk.state_dict().items())


class Gadget:
    def __reduce__(self) -> object:
        return os.system, ("touch canary",)


def damage(tmp_path: Path, kind: str) -> Path:
    good = {k: v.clone() for k, v in torchvision_trunk("squeezenet1_1", 1)[0].state_dict().items()}
    name = next(iter(good))
    path = tmp_path / "w.safetensors"
    match kind:
        case "nan":
            good[name][0] = torch.nan
        case "missing":
            del good[name]
        case "extra":
            good["surplus.weight"] = torch.ones(1)
        case "shape":
            good[name] = torch.ones(2, 2)
    save_file(good, path)
    match kind:
        case "truncated":
            path.write_bytes(path.read_bytes()[:1000])
        case "huge header":
            path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
        case "overlap":
            header = json.dumps(
                {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}
            ).encode()
            path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        case "pickle":
            path = tmp_path / "w.pth"
            path.write_bytes(pickle.dumps({"x": Gadget()}))
        case "list":
            path = tmp_path / "w.pth"
            torch.save([1, 2], path)
        case "text":
            path = tmp_path / "w.pth"
            path.write_text("hello")
    return path


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("truncated", "not a readable safetensors"),  # row 53
        ("huge header", "not a readable safetensors"),  # row 54
        ("overlap", "not a readable safetensors"),  # row 55
        ("nan", "not finite"),  # row 56
        ("missing", "is missing"),  # row 57
        ("extra", "unexpected tensor surplus.weight"),  # row 58
        ("shape", r"has shape \(2, 2\), expected"),  # row 59
        ("pickle", "objects other than tensors"),  # row 61
        ("list", "expected a dict of tensors"),
        ("text", "objects other than tensors|not a readable torch file"),
    ],
)
def test_a_damaged_weights_file_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = damage(tmp_path, kind)
    section = BackboneSection(name="torchvision:squeezenet1_1", weights=str(path), image_size=32)
    with pytest.raises(WeightsError, match=pattern) as caught:
        load_vision_encoder(resolve(section, 1), section, 1)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def tiny_bert(folder: Path, **config_keys: float) -> Path:
    """A really saved transformers encoder of two small layers, with its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "good", "bad"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, **config_keys,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_folder_of_save_pretrained_is_a_backbone(tmp_path: Path) -> None:
    section = BackboneSection(name=str(tiny_bert(tmp_path / "bert")), max_tokens=16)
    found = resolve(section, 1)
    encoder = load_text_encoder(found, section, 1).eval()
    saved = load_file(tmp_path / "bert" / "model.safetensors")
    loaded = encoder.model.state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in saved.items() if n in loaded)
    assert encoder(encoder.preprocess_and_collate(["good", "a b c d"])).shape == (2, 32)


@pytest.mark.parametrize("kind", ["nan", "truncated", "missing"])
def test_a_damaged_transformers_folder_is_refused(tmp_path: Path, kind: str) -> None:
    path = tiny_bert(tmp_path / "bert") / "model.safetensors"
    state = load_file(path)
    name = "encoder.layer.0.output.dense.weight"
    if kind == "nan":
        state[name][0] = torch.nan
    if kind == "missing":
        del state[name]
    save_file(state, path, metadata={"format": "pt"})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    section = BackboneSection(name=str(tmp_path / "bert"))
    with pytest.raises(WeightsError) as caught:
        load_text_encoder(resolve(section, 1), section, 1)
    assert str(tmp_path / "bert") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "image",
        "image channels_last",
        pytest.param("text compiled", marks=pytest.mark.slow),
        pytest.param("image compiled", marks=pytest.mark.slow),
        pytest.param("image channels_last compiled", marks=pytest.mark.slow),
    ],
)
@pytest.mark.processes
def test_features_do_not_depend_on_neighbours_or_place_or_workers(tmp_path: Path, kind: str) -> None:
    if kind.startswith("text"):
        section = BackboneSection(name=str(tiny_bert(tmp_path / "bert")), max_tokens=32)
        encoder: Encoder = load_text_encoder(resolve(section, 1), section, 1)
        inputs: list[object] = ["abc " * (1 + i % 7) + "good" * (i % 2) for i in range(2 * BATCH + 5)]
    else:
        name, layout = "atoll:lenet" if "compiled" in kind else "torchvision:mobilenet_v2", "last" in kind
        section = BackboneSection(name=name, weights="random", image_size=32, channels_last=layout)
        encoder = load_vision_encoder(resolve(section, 1), section, 1)
        inputs = list(grey_png_shard(2 * BATCH + 5, classes=3).inputs)
    plain = extract(encoder, inputs, threads=1, device="cpu")
    if "compiled" in kind:
        encoder = CompiledEncoder(encoder)
    whole = extract(encoder, inputs, threads=1, device="cpu")
    torch.testing.assert_close(whole, plain, rtol=1e-3, atol=1e-3)  # features of about 1, over fifty layers
    for rows in ([0], [36, 3, 20], list(range(36, -1, -1)), list(range(5, 22))):
        part = extract(encoder, [inputs[r] for r in rows], threads=1, device="cpu")
        assert torch.equal(part, whole[rows]), rows


@pytest.mark.slow
@pytest.mark.processes
def test_a_compiled_encoder_gives_the_same_bits_in_another_process(tmp_path: Path) -> None:
    """Which compiles for itself, and gets the inputs in another order."""
    script = (
        "import sys, torch\n"
        "from safetensors.torch import save_file\n"
        "from atoll.job.job import BackboneSection\n"
        "from atoll.learning.compiled import CompiledEncoder\n"
        "from atoll.backbones.extract import extract\n"
        "from atoll.backbones.vision import load_vision_encoder\n"
        "from atoll.backbones.resolve import resolve\n"
        "from tests.support.small import grey_png_shard\n"
        "section = BackboneSection(name='atoll:lenet', weights='random', image_size=32,\n"
        "                          channels_last=True, compile=True)\n"
        "encoder = CompiledEncoder(load_vision_encoder(resolve(section, 1), section, 1))\n"
        "inputs = list(grey_png_shard(21, classes=3).inputs)[:: int(sys.argv[1])]\n"
        "save_file({'f': extract(encoder, inputs, threads=1, device='cpu')}, sys.argv[2])\n"
    )
    found = []
    for step in ("1", "-1"):
        out = tmp_path / f"{step}.safetensors"
        process = python(script, step, out, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / step)})
        assert process.wait() == 0, process.communicate()
        found.append(load_file(out)["f"])
    assert torch.equal(found[0], found[1].flip(0))


@pytest.mark.processes
def test_every_setting_of_the_backbone_has_a_cache_of_its_own(tmp_path: Path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    section = BackboneSection(name=str(bert))
    found = resolve(section, 1)
    changed = [
        section.model_copy(update=update)
        for update in ({}, {"channels_last": True}, {"compile": True}, {"max_tokens": 7}, {"pool": "first"})
    ]
    keys = {cache_key(found, s, 1) for s in changed} | {cache_key(found, section, 2)}
    keys |= {cache_key(found, section, 1, augment=["crop"], seed=s, view=v) for s in (1, 2) for v in (0, 1)}
    (bert / "tokenizer.json").write_text((bert / "tokenizer.json").read_text() + " ")
    assert len(keys | {cache_key(found, section, 1)}) == 11


def test_a_missing_compiler_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    job = image_job("squeezenet1_1", train={"lr": 0.1})
    asked = job.model_copy(update={"backbone": job.backbone.model_copy(update={"compile": True})})
    with pytest.raises(
        ConfigError, match=r"backbone\.compile: found no C\+\+ compiler 'no-such-comp"
    ) as caught:
        check_fits(asked, task_named(asked.task.name))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.processes
def test_a_compiler_that_fails_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    script = (
        "from tests.support.small import grey_png_shard\n"
        "from atoll.backbones.extract import extract\n"
        "from atoll.backbones.resolve import resolve\n"
        "from atoll.backbones.vision import load_vision_encoder\n"
        "from atoll.errors import ConfigError\n"
        "from atoll.job.job import BackboneSection\n"
        "from atoll.learning.compiled import CompiledEncoder\n"
        "section = BackboneSection(name='raw:pixels', image_size=8)\n"
        "encoder = CompiledEncoder(load_vision_encoder(resolve(section, 1), section, 1))\n"
        "try:\n"
        "    extract(encoder, grey_png_shard(2, classes=2).inputs, threads=1, device='cpu')\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    # A Python of its own, for torch reads $CXX when it is imported.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("backbone.compile: torch.compile failed: ") and done.stdout.count("\n") == 1


def test_load_weights_reads_what_torch_saves(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "w.pth")
    assert load_weights(tmp_path / "w.pth")["a"].tolist() == [1, 1]


def test_a_transformers_vision_model_is_a_backbone_for_images(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    section = BackboneSection(name=str(tmp_path / "vit"))
    encoder = load_vision_encoder(resolve(section, 1), section, 1)
    shard = grey_png_shard(20, classes=2)
    features = extract(encoder, shard.inputs, threads=1, device="cpu")
    assert features.shape == (20, 32)
    assert torch.equal(extract(encoder, shard.inputs[7:9], threads=1, device="cpu"), features[7:9])


def test_a_text_model_is_refused_for_images_and_a_vision_model_for_texts(tmp_path: Path) -> None:
    text = BackboneSection(name=str(tiny_bert(tmp_path / "bert")))
    with pytest.raises(WeightsError, match="is not a vision model, found bert"):
        load_vision_encoder(resolve(text, 1), text, 1)
    vision = BackboneSection(name="torchvision:squeezenet1_1", weights="random")
    with pytest.raises(WeightsError, match="does not read text"):
        load_text_encoder(resolve(vision, 1), vision, 1)


def test_a_layout_that_many_clients_at_once_cannot_have_is_refused_by_its_key() -> None:
    """By `--engine cohort`, and by private steps of a network that Opacus has no rule for."""
    pictures = torch.zeros(2, 3, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"backbone\.channels_last: torch\.func has no such layout"):
        torch.func.vmap(lambda one: in_layout(one, torch.channels_last))(pictures)
    plain = torch.func.vmap(lambda one: in_layout(one, torch.contiguous_format))(pictures)
    assert torch.equal(plain, pictures)
    assert in_layout(pictures[0], torch.channels_last).is_contiguous(memory_format=torch.channels_last)
