"""Encodes and hashes tensors, which are a flat dict from a parameter's name to its values."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from atoll.errors import DataError

Tensors = dict[str, torch.Tensor]

ALIGNMENT = 64
"""Tensors of torch's own begin at addresses that are multiples of so many bytes."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, as a copy if its values begin at another address than one of torch's own tensors could.

    In what order the CPU's libraries add up products depends on that, and so do a result's last bits: of the
    same values, those that were read from a file or a message must not give others than those that were
    computed here.
    """
    if tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def all_aligned(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors, each as `aligned` returns it."""
    return {name: aligned(tensor) for name, tensor in tensors.items()}


def to_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The tensors as safetensors bytes: names, dtypes, shapes and values, and text as `metadata`."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return save(plain, metadata)


CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""The names of torch's dtypes in safetensors."""


def file_parts(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes that `to_bytes` returns, in parts, without copying tensors.

    Only tensors that are not contiguous, or on another device, are copied, one at a time.
    """
    return _parts(tensors, metadata, 1)


def mapped_file_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """As `file_parts`, with bytes between the tensors, so that each is `aligned` where the file is mapped."""
    return _parts(tensors, None, ALIGNMENT)


def _parts(
    tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None, multiple: int
) -> Iterator[bytes | memoryview]:
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start, gaps = 0, {}
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        code = CODES[str(tensor.dtype).removeprefix("torch.")]
        head[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start, gaps[name] = end, -end % multiple
        if gaps[name]:  # the format wants each byte to be a tensor's
            start += gaps[name]
            head[f"after {name}"] = {"dtype": "U8", "shape": [gaps[name]], "data_offsets": [end, start]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % max(multiple, 8))
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensor_view(tensors[name])
        if gaps[name]:
            yield bytes(gaps[name])


def from_bytes(blob: bytes) -> Tensors:
    """The tensors that `to_bytes` wrote.

    Raises:
        DataError: the bytes are not safetensors.
    """
    try:
        tensors: Tensors = load(blob)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"not a safetensors message of {len(blob)} bytes: {error}") from None
    for name in tensors:  # one at a time, for they may be large
        tensors[name] = aligned(tensors[name])
    return tensors


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """The size in bytes of all values together."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values in row order, little-endian."""
    return bytes(tensor_view(tensor))


def tensor_view(tensor: torch.Tensor) -> memoryview:
    """As `tensor_bytes`, without a copy where the values are contiguous in this machine's memory."""
    if sys.byteorder != "little":
        raise RuntimeError("hashes are defined over little-endian bytes; this machine is big-endian")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors sorted by name: name, dtype, shape, little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor_view(tensor))
    return digest.hexdigest()
