"""What a process has freed it keeps, so that the next step's gradients cost no page faults."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = """
import resource, sys, torch
from tasks.devices import settle
if sys.argv[1] == "settled":
    settle("cpu")
def step():
    return [torch.ones(1_200_000) for _ in range(4)]
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    """Page faults of twenty steps that take and free four tensors of 4.8 MB, in a process of their own."""
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


def test_a_step_costs_no_page_faults_once_the_process_is_settled() -> None:
    pages = 20 * 4 * 4_800_000 // 4096
    assert faults("plain") > pages // 2
    assert faults("settled") < pages // 50


def test_how_memory_is_kept_can_be_said_by_the_environment() -> None:
    pages = 20 * 4 * 4_800_000 // 4096
    assert faults("settled", MALLOC_TRIM_THRESHOLD_="0") > pages // 2
