"""What a process has freed it keeps, so that the next step's gradients cost no page faults."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LARGEST = 30
STEPS = f"""
import ctypes, resource, sys, torch
from atoll.learning.determinism import enable_determinism
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages (PR_SET_THP_DISABLE): a fault is of 4,096 bytes
if sys.argv[1] == "settled":
    enable_determinism("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(1, {LARGEST} + 1):
    torch.ones(size * 250_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
"""Every tensor is larger than all before it, which glibc, left alone, asks of the system anew: it keeps
no more than what was as large as something freed before, and of that what happens to lie well."""
PAGES = sum(range(1, LARGEST + 1)) * 1_000_000 // 4096


def faults(how: str, **environment: str) -> int:
    """Page faults of thirty tensors, of 1 to 30 MB, each freed before the next, in a process of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how],
        cwd=ROOT,
        env={**own, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(autouse=True)
def glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another C library")


@pytest.mark.processes
def test_what_was_freed_costs_no_page_faults_once_the_process_is_settled() -> None:
    assert faults("plain") > 0.9 * PAGES
    assert faults("settled") < 0.2 * PAGES


@pytest.mark.processes
def test_how_memory_is_kept_can_be_said_by_the_environment() -> None:
    assert faults("settled", MALLOC_TRIM_THRESHOLD_="0") > 0.9 * PAGES
