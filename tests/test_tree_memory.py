"""What a run says of memory: that of all its processes."""

import mmap
import os

import pytest

from atoll.system.memory import PeakMemory, held_bytes, parents, tree, tree_bytes

MB = 2**20


@pytest.mark.processes
def test_a_child_counts_and_what_it_shares_counts_once() -> None:
    """200 MB before the fork, which the child only reads, and 100 MB of the child's own."""
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
    try:
        os.read(reading, 1)
        alone, beside = held_bytes(os.getpid()), held_bytes(child)
        assert child in tree(os.getpid(), parents())
        assert tree_bytes(os.getpid()) > alone + beside - 30 * MB  # other tests' processes may be there too
    finally:
        os.write(go_on, b".")
        os.waitpid(child, 0)
    after = held_bytes(os.getpid())
    assert len(shared) == 200 * MB
    # this process again, with the shared pages, and the child's own 100 MB beside it
    assert alone + beside == pytest.approx(after + 100 * MB, abs=30 * MB)
    assert alone < after - 90 * MB  # half of the shared pages
    assert held_bytes(child) == 0


def test_the_peak_is_remembered_after_the_memory_is_given_back() -> None:
    with PeakMemory() as memory:
        before = memory.mb()
        held = mmap.mmap(-1, 50 * MB)
        held.write(b"x" * (50 * MB))
        most = memory.mb()
        held.close()
        assert most == memory.mb() >= before
