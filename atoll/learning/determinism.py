"""Where a job computes: whether that can be had here, and what makes it compute the same bits again."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from atoll.errors import ConfigError


def check_device(device: str) -> None:
    """Raises ConfigError if torch cannot compute on it here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"train.device: {device!r} cannot be used on this machine: {why}") from None


def is_gpu(device: str) -> bool:
    """Whether it is one of CUDA's (or ROCm's)."""
    return torch.device(device).type == "cuda"


def enable_determinism(device: str) -> None:
    """Have a GPU multiply the same way every time, in whole float32: for this process, from here on.

    cuDNN and cuBLAS otherwise choose among ways to sum, and round products to 10 bits (TF32). What a
    processor has freed the process keeps.
    """
    keep_freed_memory()
    if not is_gpu(device):
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names of what `mallopt` sets (malloc.h)."""


@cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 512 MB that was freed: a step's gradients need as much again a moment later.

    Given back and asked for anew, every page of them costs a fault, which for layers of millions of
    numbers takes longer than their arithmetic. Elsewhere than on glibc nothing changes, and not
    where the environment says how memory is kept.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, 32 << 20)  # the most that every version takes
        library.mallopt(TRIM_THRESHOLD, 512 << 20)


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Within, a GPU takes the same gradients every time; torch warns of an operation that has no such way.

    For training alone: metrics, told so, would compare every value with every bin.
    """
    if not is_gpu(device):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
