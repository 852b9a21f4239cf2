"""Checks that a job's device is available, and makes it compute the same bits every time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from atoll.errors import ConfigError


def check_device(device: str) -> None:
    """Raises ConfigError if torch cannot compute on `device` here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"train.device: {device!r} cannot be used on this machine: {why}") from None


def is_gpu(device: str) -> bool:
    """Whether the device is a GPU of CUDA or ROCm."""
    return torch.device(device).type == "cuda"


def names_gpu(device: str) -> bool:
    """Whether the device is one GPU by its number, such as `cuda:1`."""
    return is_gpu(device) and torch.device(device).index is not None


def shared_gpus(device: str) -> int:
    """How many GPUs of this machine worker processes share among them; 1 for a processor or a named GPU.

    A job names one by its number, such as `cuda:1`; `cuda` alone leaves the choice.
    """
    has_choice = is_gpu(device) and not names_gpu(device)
    return max(1, torch.cuda.device_count()) if has_choice else 1


def use_shared_gpu(device: str, worker: int) -> None:
    """In a worker process: compute on the GPU that falls to its number, one worker after the other."""
    if (gpus := shared_gpus(device)) > 1:
        torch.cuda.set_device(worker % gpus)


def enable_determinism(device: str) -> None:
    """Make a GPU multiply in full float32 and in the same order every time, for the rest of this process.

    cuDNN and cuBLAS otherwise choose among several orders of summation, and round factors to 10 bits (TF32).
    On a processor, freed memory is kept for reuse instead (`keep_freed_memory`).
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
    """Make glibc keep up to 512 MB of freed memory, which the next step's gradients need again.

    If it were returned to the system, every page would cost a page fault, which for layers of millions of
    numbers takes longer than their arithmetic. Nothing changes without glibc, or where environment variables
    configure its memory.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, 32 << 20)  # the most that every version takes
        library.mallopt(TRIM_THRESHOLD, 512 << 20)


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Within the block, a GPU computes gradients with the same bits every time, or torch warns that it can't.

    It is for training only, since deterministic metrics would compare every value with every bin.
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
