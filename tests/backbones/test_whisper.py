"""Whisper's encoder: the same states as transformers', in any window; its weights, also CTranslate2's."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from atoll.backbones.converted.ctranslate import encoder_folder, read_model
from atoll.backbones.ctc_vocabulary import ENGLISH_LETTERS
from atoll.client.training.local_sgd import train_model
from atoll.data.audio import RATE
from atoll.errors import ConfigError, WeightsError
from atoll.learning.learner import Learner
from tests.support.models import small_whisper
from tests.tasks.sound.test_speech import TEXTS, learner_of, shard_of, sound, tones

SECONDS = 2.0
OPTIONS = {"name": "speech-recognition", "options": {"max_seconds": SECONDS}}


def learner_on(folder: Path, tune: dict[str, Any] | None = None, **backbone: Any) -> Learner:
    return learner_of(tune, task=OPTIONS, backbone={"name": str(folder)} | backbone)


def noise(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(count).normal(0, 0.1, count).astype(np.float32)


# As short as may be, around whole frames, with the end near the window's, and all of it.
@pytest.mark.parametrize("count", [800, 15_999, 16_000, 16_001, 16_120, 31_700, 31_999, 32_000])
def test_mel_features_and_states_are_those_of_transformers(tmp_path: Path, count: int) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    folder = small_whisper(tmp_path / "m", positions=100)
    samples = noise(count)
    samples[count // 2 : count // 2 + 300] = 0
    encoder = learner_on(folder).encoder.eval()
    batch = encoder.preprocess_and_collate([sound(samples)])
    read, _ = soundfile.read(io.BytesIO(sound(samples)), dtype="float32")
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    wanted = extractor(read, sampling_rate=RATE, return_tensors="pt").input_features
    assert torch.allclose(batch["sound"].transpose(1, 2), wanted, atol=1e-5)
    theirs = WhisperModel.from_pretrained(folder).encoder.eval()
    with torch.no_grad():
        states, frames = encoder(batch)
        full = theirs(wanted).last_hidden_state
    # A state every 320 samples; one more may hear the end of the last.
    assert 0 <= int(frames) - -(-count // 320) <= 1
    assert states.shape[1] == int(frames) <= 100
    assert torch.allclose(states, full[:, : int(frames)], atol=1e-5)


def test_a_shorter_window_has_the_first_places_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    folder = small_whisper(tmp_path / "m", positions=150)
    places = learner_on(folder).model.backbone.model.embed_positions.weight
    from transformers import WhisperModel

    assert torch.equal(places, WhisperModel.from_pretrained(folder).encoder.embed_positions.weight[:100])
    short = small_whisper(tmp_path / "short", positions=50)
    with pytest.raises(ConfigError, match=r"task\.options\.max_seconds: .* at most 1 seconds, found 2"):
        _ = learner_on(short).model


def test_it_writes_with_our_letters_and_not_with_the_pieces_of_its_decoder(tmp_path: Path) -> None:
    learner = learner_on(small_whisper(tmp_path / "m"))
    assert learner.model.head.weight.shape == (ENGLISH_LETTERS.size, 32)


@pytest.mark.parametrize(
    "tune",
    [
        {"method": "head"},
        {"method": "last-k", "layers": 1},
        {"method": "lora", "rank": 2},
        {"method": "full"},
    ],
    ids=lambda tune: str(tune["method"]),
)
def test_every_way_of_tuning_takes_a_step(tmp_path: Path, tune: dict[str, Any]) -> None:
    learner = learner_on(small_whisper(tmp_path / "m"), tune)
    shard = shard_of(learner, tmp_path / "d", *TEXTS)
    start = learner.initial()
    update = train_model(learner, start, shard, learner.job, client="a", round=1, plan={})
    assert bool(update.delta["head.weight"].any()) and bool(update.delta["head.bias"].any())
    inside = {name for name in start if not name.startswith("head.")}
    if tune["method"] == "last-k":
        assert inside and all(".layers.1." in name or ".layer_norm." in name for name in inside)
    if tune["method"] == "lora":
        assert inside and all(".lora_" in name for name in inside)
    assert bool(inside) == (tune["method"] != "head")
    assert not any("decoder" in name for name in start)


@pytest.mark.parametrize("tune", [{"method": "head"}, {"method": "last-k", "layers": 1}])
def test_states_below_what_is_tuned_are_kept_on_disk(
    tmp_path: Path, tune: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOLL_CACHE", str(tmp_path / "cache"))
    folder = small_whisper(tmp_path / "m")

    def trained(name: str, states: str | None) -> dict[str, torch.Tensor]:
        train = {"optimizer": "sgd", "lr": 0.01, "batch_size": 4, "epochs": 2}
        kept = {} if states is None else {"cached_states": states}
        learner = learner_of(tune, task=OPTIONS, backbone={"name": str(folder)}, train=train | kept)
        shard = shard_of(learner, tmp_path / name, *TEXTS)
        start = learner.initial()
        delta = train_model(learner, start, shard, learner.job, client="a", round=1, plan={}).delta
        return delta | learner.evaluate({n: t + delta[n] for n, t in start.items()}, shard)

    cold, warm, whole = trained("cold", "fp32"), trained("warm", "fp32"), trained("whole", None)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 1
    assert all(torch.equal(tensor, warm[name]) for name, tensor in cold.items())
    torch.testing.assert_close(cold, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["WhisperForConditionalGeneration", "WhisperModel"])
def test_folders_with_a_decoder_give_their_encoder(tmp_path: Path, kind: str) -> None:
    import transformers

    folder = small_whisper(tmp_path / "m", kind=kind)
    whole = getattr(transformers, kind).from_pretrained(folder).get_encoder().state_dict()
    own = learner_on(folder).model.backbone.model.state_dict()
    assert set(own) == set(whole)
    assert all(torch.equal(t, whole[n]) for n, t in own.items() if n != "embed_positions.weight")


def test_a_run_goes_on_from_the_encoder_of_another(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, run = small_whisper(tmp_path / "m"), tmp_path / "run" / "model"
    first = learner_on(folder, {"method": "full"}, weights="random")
    start = first.initial()
    run.mkdir(parents=True)
    save_file(start, run / "model.safetensors")
    about = {"job": first.job.model_dump(mode="json"), "facts": first.data_info}
    (run / "model.json").write_text(json.dumps(about))
    again = learner_on(folder, {"method": "full"}, weights=str(tmp_path / "run")).initial()
    assert all(torch.equal(t, start[name]) for name, t in again.items() if name.startswith("backbone."))
    others = learner_on(folder, {"method": "full"}).initial()
    name = "backbone.model.layers.0.fc1.weight"
    assert not torch.equal(others[name], start[name])


def test_what_is_no_whisper_inside_is_one_line(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = small_whisper(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.encoder.layers.1.fc2.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"tensor layers\.1\.fc2\.bias is missing"):
        _ = learner_on(folder).model
    save_file({"x": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(WeightsError, match="holds no encoder"):
        _ = learner_on(folder).model


# CTranslate2


def named(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def stored(variables: dict[str, NDArray[Any]], kind: str = "WhisperSpec", version: int = 6) -> bytes:
    """A file as CTranslate2's converter writes it."""
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + named(kind) + struct.pack("<II", 3, len(variables))
    for name, values in variables.items():
        out += named(name) + struct.pack("<B", values.ndim) + struct.pack(f"<{values.ndim}I", *values.shape)
        out += struct.pack("<BI", kinds[values.dtype.name], values.nbytes) + values.tobytes()
    return (
        out + struct.pack("<I", 1) + named("decoder/projection/weight") + named("decoder/embeddings/weight")
    )


def as_ctranslate(folder: Path) -> dict[str, NDArray[Any]]:
    """A small Whisper's encoder under CTranslate2's names, query, key and value in one."""
    from transformers import WhisperModel

    encoder = WhisperModel.from_pretrained(folder).encoder
    said: dict[str, Any] = {"encoder/num_heads": np.array(4, np.int16)}

    def put(name: str, module: Any) -> None:
        first, second = ("gamma", "beta") if isinstance(module, torch.nn.LayerNorm) else ("weight", "bias")
        said[f"encoder/{name}/{first}"], said[f"encoder/{name}/{second}"] = module.weight, module.bias

    said["encoder/position_encodings/encodings"] = encoder.embed_positions.weight
    put("conv1", encoder.conv1), put("conv2", encoder.conv2), put("layer_norm", encoder.layer_norm)
    for number, layer in enumerate(encoder.layers):
        mine, parts = (
            layer.self_attn,
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        )
        root = f"encoder/layer_{number}/self_attention/linear_0"
        said[f"{root}/weight"] = torch.cat([part.weight for part in parts])
        said[f"{root}/bias"] = torch.cat([mine.q_proj.bias, torch.zeros(32), mine.v_proj.bias])
        put(f"layer_{number}/self_attention/linear_1", mine.out_proj)
        put(f"layer_{number}/self_attention/layer_norm", layer.self_attn_layer_norm)
        put(f"layer_{number}/ffn/layer_norm", layer.final_layer_norm)
        put(f"layer_{number}/ffn/linear_0", layer.fc1), put(f"layer_{number}/ffn/linear_1", layer.fc2)
    made = {n: v if isinstance(v, np.ndarray) else v.detach().numpy() for n, v in said.items()}
    return made | {"decoder/embeddings/weight": np.zeros((4, 2), np.float16)}


def package(root: Path, data: bytes) -> Path:
    root.mkdir()
    (root / "model.bin").write_bytes(data)
    return root


def test_an_encoder_of_ctranslate_becomes_the_one_it_was_made_of(tmp_path: Path) -> None:
    source = small_whisper(tmp_path / "m")
    folder = encoder_folder(package(tmp_path / "p", stored(as_ctranslate(source))))
    assert json.loads((folder / "config.json").read_text())["encoder_attention_heads"] == 4
    wanted = learner_on(source).model.backbone.model.state_dict()
    found = learner_on(folder).model.backbone.model.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    values = np.array([1.5, -2.25], np.float16)
    path = package(tmp_path / "p", stored({"x": values, "n": np.array(6, np.int16)})) / "model.bin"
    read = read_model(path)
    assert read["x"].dtype == torch.float16 and read["x"].tolist() == [1.5, -2.25]
    assert int(read["n"]) == 6


def quantised(variables: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {n: v.astype(np.int8) if n.endswith("/weight") else v for n, v in variables.items()}


def spoilt(variables: dict[str, NDArray[Any]], how: str) -> bytes:
    whole = stored(variables)
    return {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "other": stored(variables, kind="TransformerSpec"),
        "newer": stored(variables, version=7),
        "missing": stored({n: v for n, v in variables.items() if "layer_1/ffn/linear_1" not in n}),
        "quantised": stored(quantised(variables)),
    }[how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "ends too early"),
        ("empty", "ends too early, expected 4 bytes more"),
        ("other", "kind 'TransformerSpec'"),
        ("newer", "version 7"),
        ("missing", "variable 'encoder/layer_1/ffn/linear_1/weight' is missing"),
        ("quantised", "whole numbers with a scale, expected float16 or float32"),
    ],
)
def test_a_damaged_or_other_file_is_one_line_and_leaves_nothing(tmp_path: Path, how: str, said: str) -> None:
    folder = package(tmp_path / "p", spoilt(as_ctranslate(small_whisper(tmp_path / "m")), how))
    with pytest.raises(WeightsError, match=said) as told:
        encoder_folder(folder)
    assert "\n" not in str(told.value) and "model.bin" in str(told.value)
    assert not folder.with_name("p-encoder").exists()


# CTranslate2 4.8.5 in float32, of two tones: states 0, 5 and 11, and of each the first three values.
HEARD = [[-0.6315, -0.7204, 1.8483], [-0.5175, 0.0410, -0.8385], [-0.9452, -0.1321, -0.7413]]


@pytest.mark.slow
@pytest.mark.processes
def test_the_packaged_whisper_hears_what_ctranslate_hears() -> None:
    tables = {
        "task": {"name": "speech-recognition", "options": {"max_seconds": 30}},
        "backbone": {"name": "hf:whisper-tiny.en"},
    }
    try:
        learner = learner_of({"method": "head"}, **tables)
    except WeightsError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        states, frames = learner.encoder.eval()(learner.encoder.preprocess_and_collate([sound(tones("ab"))]))
    assert states.shape == (1, int(frames), 384)
    assert torch.allclose(states[0, [0, 5, 11], :3], torch.tensor(HEARD), atol=1e-3)
