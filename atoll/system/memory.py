"""How much memory this process and all that descend from it hold together.

A page that several processes share counts once: each process has its proportional share of it (Linux's
PSS), so that the sum over processes is what the machine has given away. The sum of resident sizes (RSS)
would count libraries, forked pages and shared tensors once for every process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Self

PROC = Path("/proc")
SECONDS_BETWEEN_SAMPLES = 0.5
LARGEST_SHARE = 0.02
"""Of the time, for looking: who holds much, or has many processes, is looked at less often."""

LARGE = 64 * 2**20
"""Bytes from which on it is worth milliseconds to give them back."""


class PeakMemory:
    """Looks twice a second, within the `with` block, and remembers the most that it saw.

    What lasts less than half a second is not looked at: of thousands of short runs it would take most.
    """

    def __init__(self) -> None:
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def mb(self) -> float:
        """The most memory seen until now, in MiB: of the tree in a sample, or of this process by itself."""
        if self._peak:
            self._look()
        return max(self._peak / 2**20, own_peak_mb())

    def _look(self) -> None:
        processes = tree(os.getpid(), parents())
        if len(processes) > 1:  # of one alone the system itself remembers the most, and looking is dear
            self._peak = max(self._peak, sum(map(held_bytes, processes)))

    def _watch(self) -> None:
        pause = SECONDS_BETWEEN_SAMPLES
        while not self._ended.wait(pause):
            started = time.monotonic()
            self._look()
            pause = max(SECONDS_BETWEEN_SAMPLES, (time.monotonic() - started) / LARGEST_SHARE)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def own_peak_mb() -> float:
    """The most memory that this process alone has held since it began, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def trim_freed_memory(size: int) -> None:
    """Let glibc give back to the system what was freed: nothing for less than `LARGE` bytes of it.

    It keeps blocks of up to 32 MB for later use, which most tensors are.
    """
    if size >= LARGE and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def tree_bytes(root: int, *, files: bool = True) -> int:
    """What a process and its descendants hold at present; 0 where the system has no `/proc`.

    Without `files` what is mapped from them is left out, which the system can take back at any time.
    """
    return sum(held_bytes(process, files=files) for process in tree(root, parents()))


def tree(root: int, parents: dict[int, int]) -> set[int]:
    """A process and its descendants, by each process's parent.

    >>> sorted(tree(2, {2: 1, 3: 2, 4: 3, 5: 1}))
    [2, 3, 4]
    """
    children: dict[int, list[int]] = {}
    for process, parent in parents.items():
        children.setdefault(parent, []).append(process)
    members, waiting = {root}, [root]
    while waiting:
        fresh = set(children.get(waiting.pop(), ())) - members
        members |= fresh
        waiting += fresh
    return members


def parents() -> dict[int, int]:
    """Each process's parent, of those that run now."""
    parent_of = {}
    for folder in PROC.glob("[0-9]*"):
        try:
            # The name, in parentheses, may have spaces and parentheses itself.
            fields = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parent_of[int(folder.name)] = int(fields[1])
    return parent_of


def held_bytes(process: int, *, files: bool = True) -> int:
    """What a process holds, shared pages by its share of them; 0 for one that has ended."""
    kinds = ("Pss:",) if files else ("Pss_Anon:", "Pss_Shmem:")
    try:
        lines = (PROC / str(process) / "smaps_rollup").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))
