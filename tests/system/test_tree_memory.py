"""What a run says of memory: that of all its processes."""

import json
import mmap
import os
import subprocess
import sys

import pytest

import atoll.system.memory
from atoll.system.memory import PeakMemory, own_peak_mb

MB = 2**20

FORKING = """
import json, mmap, os
from atoll.system.memory import held_bytes, parents, tree, tree_bytes
MB = 2**20
shared = bytearray(b"x") * (200 * MB)
reading, writing = os.pipe()
begin, go_on = os.pipe()
child = os.fork()
if child == 0:
    own = mmap.mmap(-1, 100 * MB)
    own.write(b"y" * (100 * MB))
    os.write(writing, b".")
    os.read(begin, 1)
    os._exit(0)
os.read(reading, 1)
me = os.getpid()
found = {"alone": held_bytes(me), "beside": held_bytes(child), "whole": tree_bytes(me)}
found["tree"] = sorted(tree(me, parents())) == sorted([me, child])
os.write(go_on, b".")
os.waitpid(child, 0)
print(json.dumps(found | {"after": held_bytes(me), "ended": held_bytes(child)}))
"""
"""200 MB before the fork, which the child only reads, and 100 MB of the child's own; in a small process, for
how much of a large one's libraries is its share depends on who else uses them."""


@pytest.mark.processes
def test_a_child_counts_and_what_it_shares_counts_once() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    alone, beside, after = found["alone"], found["beside"], found["after"]
    assert found["tree"] and found["ended"] == 0
    assert found["whole"] == pytest.approx(alone + beside, abs=20 * MB)
    # This process again, with the shared pages, and the child's own 100 MB beside it.
    assert alone + beside == pytest.approx(after + 100 * MB, abs=20 * MB)
    assert alone < after - 90 * MB  # half of the shared pages


def test_the_peak_is_remembered_after_the_memory_is_given_back() -> None:
    with PeakMemory() as memory:
        before = memory.mb()
        held = mmap.mmap(-1, 50 * MB)
        held.write(b"x" * (50 * MB))
        most = memory.mb()
        held.close()
        assert memory.mb() >= most >= before


def test_only_what_several_processes_hold_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    me, memory = os.getpid(), PeakMemory()
    monkeypatch.setattr(atoll.system.memory, "parents", lambda: {me: 1, me + 1: 1})
    monkeypatch.setattr(atoll.system.memory, "held_bytes", lambda process: 2**40)
    memory._look()
    assert memory.mb() == pytest.approx(own_peak_mb(), abs=1) and memory.mb() < 2**20
    monkeypatch.setattr(atoll.system.memory, "parents", lambda: {me: 1, me + 1: me})
    memory._look()
    assert memory.mb() == 2 * 2**20  # of both, in MiB
