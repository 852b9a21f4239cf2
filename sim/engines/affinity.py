"""Assigns blocks of clients to workers: to the one that had them before, unless they would have to wait.

A worker caches the decoded inputs of its clients, so a client takes less time where it was before.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

KNOWN_CLIENTS = 1 << 16
"""How many clients' workers are remembered; those used least recently are forgotten first."""


@dataclass
class WorkerAffinity:
    """Remembers the worker that had each client last."""

    _worker: dict[str, int] = field(default_factory=dict)

    def of(self, block: Sequence[str]) -> int | None:
        """The worker that had the block's first client last."""
        return self._worker.get(block[0])

    def assign(self, block: Sequence[str], worker: int) -> None:
        """Remember that these clients are at this worker now."""
        for client in block:
            self._worker.pop(client, None)
            self._worker[client] = worker
        while len(self._worker) > KNOWN_CLIENTS:
            del self._worker[next(iter(self._worker))]

    def forget(self, worker: int) -> None:
        """Forget all clients of a worker, which was replaced by a new one."""
        for client in [client for client, home in self._worker.items() if home == worker]:
            del self._worker[client]


class Queue:
    """Blocks that wait for a worker, grouped by the worker that had them last."""

    def __init__(self, homes: WorkerAffinity, blocks: Sequence[list[str]]) -> None:
        self._homes = homes
        self._waiting: defaultdict[int | None, deque[list[str]]] = defaultdict(deque)
        for block in blocks:
            self.put(block)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, block: list[str]) -> None:
        """Add a block to the queue."""
        self._waiting[self._homes.of(block)].append(block)

    def next_for(self, worker: int) -> list[str] | None:
        """A block that no worker had yet, else one that this worker had, else any; None if none is left.

        New clients take the longest and come first, so that the work left at the end is short.
        """
        for home in (None, worker, *self._by_length()):
            if self._waiting[home]:
                block = self._waiting[home].popleft()
                self._homes.assign(block, worker)
                return block
        return None

    def _by_length(self) -> list[int | None]:
        return sorted(self._waiting, key=lambda home: len(self._waiting[home]), reverse=True)
