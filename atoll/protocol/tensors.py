"""Tensors that travel and are hashed: a flat dict from a parameter's name to its values."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from atoll.errors import DataError

Tensors = dict[str, torch.Tensor]


def to_bytes(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Safetensors bytes: names, dtypes, shapes and values, and words beside them."""
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    return save(plain, metadata)


def from_bytes(blob: bytes) -> Tensors:
    """Read what `to_bytes` wrote.

    Raises:
        DataError: the bytes are not safetensors.
    """
    try:
        return load(blob)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"not a safetensors message of {len(blob)} bytes: {error}") from None


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the tensors' values."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The values in row order, little-endian."""
    if sys.byteorder != "little":
        raise RuntimeError("hashes are defined over little-endian bytes; this machine is big-endian")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors sorted by name: name, dtype, shape, little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{','.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
