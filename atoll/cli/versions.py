"""What `atoll --version` says: the versions and the processor that a run's bits depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from atoll import __version__

PACKAGES = {"torch": "torch", "Flower": "flwr", "Opacus": "opacus"}
CPUINFO = Path("/proc/cpuinfo")

AVX512 = {"avx512vl", "avx512bw", "avx512dq", "fma"}
AVX2 = {"avx2", "fma"}
"""What torch asks a processor for before it uses the instructions (ATen/native/DispatchStub.cpp)."""

NAMED = {"avx512": "AVX512", "avx2": "AVX2", "default": "DEFAULT"}
"""What ATEN_CPU_CAPABILITY can ask for; torch leaves anything else unheeded."""


def versions() -> Iterator[str]:
    """A line each for Atoll, for what its bits hang on, and for the processor; nothing is imported."""
    yield f"atoll {__version__}"
    for name, package in PACKAGES.items():
        yield f"{name} {_version(package)}"
    capability = cpu_capability()
    yield f"processor {platform.machine()}" + (f", {capability}" if capability else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


def cpu_capability() -> str | None:
    """What `torch.backends.cpu.get_cpu_capability()` says, by torch's own rule and without torch.

    None where this isn't an x86 processor under Linux, whose rule is another.
    """
    if platform.machine() != "x86_64" or not CPUINFO.is_file():
        return None
    if (capability := os.environ.get("ATEN_CPU_CAPABILITY")) in NAMED:
        return NAMED[capability]
    flags = _flags(CPUINFO.read_text("utf-8"))
    if flags >= AVX512:
        return "AVX512"
    return "AVX2" if flags >= AVX2 else "DEFAULT"


def _flags(cpuinfo: str) -> set[str]:
    """The instructions that the first processor has and the system lets programs use."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()
