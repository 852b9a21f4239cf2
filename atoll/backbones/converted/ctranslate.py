"""Files of CTranslate2 (`model.bin`), of which Whisper's encoder is taken and written as transformers has it.

A file is little-endian: a version, the model's kind and revision, then variables (name, shape, type,
bytes), then other names of some of them.
"""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from atoll.errors import WeightsError
from atoll.protocol.tensors import Tensors
from atoll.system.cache import cached_folder

_VERSION = 6
_KINDS = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_KIND_OF_MODEL = "WhisperSpec"
_LAYER_PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_VALUES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


class _Reader:
    """What stands at a place of the file, and then the next."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = io.BytesIO(path.read_bytes())

    def bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise WeightsError(f"{self._path}: ends too early, expected {count - len(data)} bytes more")
        return data

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(f"<{layout}", self.bytes(struct.calcsize(f"<{layout}")))

    def text(self) -> str:
        """A name; its length counts the zero behind it."""
        return self.bytes(self.numbers("H")[0]).rstrip(b"\0").decode("utf-8", "replace")


def read_model(path: Path) -> Tensors:
    """The variables of a Whisper model, as they are stored.

    Raises:
        WeightsError: it is another file, or is cut off.
    """
    reader = _Reader(path)
    (version,) = reader.numbers("I")
    kind = reader.text() if version == _VERSION else ""
    if kind != _KIND_OF_MODEL:
        raise WeightsError(
            f"{path}: not a {_KIND_OF_MODEL} of CTranslate2 in version {_VERSION}"
            f" (version {version}, kind {kind!r})"
        )
    _revision, count = reader.numbers("II")
    return dict(_variable(reader, path) for _ in range(count))


def _variable(reader: _Reader, path: Path) -> tuple[str, torch.Tensor]:
    name = reader.text()
    (rank,) = reader.numbers("B")
    shape = reader.numbers(f"{rank}I")
    kind, size = reader.numbers("BI")
    if kind not in _KINDS:
        raise WeightsError(f"{path}: variable {name} is of type {kind}, expected one of {sorted(_KINDS)}")
    expected = math.prod(shape) * np.dtype(_KINDS[kind]).itemsize
    if size != expected:
        raise WeightsError(f"{path}: variable {name} of shape {shape} has {size} bytes, expected {expected}")
    values = np.frombuffer(reader.bytes(size), _KINDS[kind])
    return name, torch.from_numpy(values.copy().reshape(shape))


def encoder_folder(package: Path) -> Path:
    """A folder of transformers' with the encoder of the Whisper model in `package`, made once beside it.

    Raises:
        WeightsError: the file is damaged, or of another network.
    """

    def fill(staging: Path) -> None:
        tensors = read_model(package / "model.bin")
        try:
            save_file(whisper_encoder(tensors), staging / "model.safetensors", {"format": "pt"})
            (staging / "config.json").write_text(json.dumps(_config(tensors), indent=1))
        except KeyError as error:
            raise WeightsError(f"{package / 'model.bin'}: variable {error} is missing") from None
        except ValueError as error:
            raise WeightsError(f"{package / 'model.bin'}: not as expected: {error}") from None

    return cached_folder(package.with_name(f"{package.name}-encoder"), fill)


def whisper_encoder(stored: Tensors) -> Tensors:
    """The encoder's tensors in float32 under transformers' names.

    Stored are query, key and value as one; a key has no bias, so zeros stand in its place.
    """
    weights = {
        f"{part}.{kind}": stored[f"encoder/{part}/{kind}"]
        for part in ("conv1", "conv2")
        for kind in ("weight", "bias")
    }
    weights["embed_positions.weight"] = stored["encoder/position_encodings/encodings"]
    for kind in ("gamma", "beta"):
        weights[f"layer_norm.{_VALUES[kind]}"] = stored[f"encoder/layer_norm/{kind}"]
    for number in range(_layers(stored)):
        layer = f"encoder/layer_{number}"
        for theirs, ours in _LAYER_PARTS.items():
            for kind in ("gamma", "beta") if "norm" in theirs else ("weight", "bias"):
                weights[f"layers.{number}.{ours}.{_VALUES[kind]}"] = stored[f"{layer}/{theirs}/{kind}"]
        for kind in ("weight", "bias"):
            together = stored[f"{layer}/self_attention/linear_0/{kind}"]
            for letter, part in zip("qkv", together.chunk(3), strict=True):
                if (letter, kind) != ("k", "bias"):
                    weights[f"layers.{number}.self_attn.{letter}_proj.{kind}"] = part
    if any(not tensor.is_floating_point() for tensor in weights.values()):
        raise ValueError("its values are whole numbers with a scale, expected float16 or float32")
    return {f"encoder.{name}": tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}


def _layers(stored: Tensors) -> int:
    return len({name.split("/")[1] for name in stored if name.startswith("encoder/layer_") and "ffn" in name})


def _config(stored: Tensors) -> dict[str, object]:
    """What transformers must know of the encoder; without the decoder, which isn't there."""
    width, bands, _ = stored["encoder/conv1/weight"].shape
    return {
        "model_type": "whisper",
        "d_model": width,
        "num_mel_bins": bands,
        "encoder_layers": _layers(stored),
        "encoder_attention_heads": int(stored["encoder/num_heads"]),
        "encoder_ffn_dim": len(stored["encoder/layer_0/ffn/linear_0/bias"]),
        "max_source_positions": len(stored["encoder/position_encodings/encodings"]),
    }
