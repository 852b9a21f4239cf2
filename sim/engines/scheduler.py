"""Schedules one round's blocks of clients on worker processes, and repeats the blocks of workers that die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from atoll.errors import JobError
from atoll.sim.engines.affinity import Queue

RETRIES = 3
"""How often a block's worker may die before the round fails."""

A = TypeVar("A")


@dataclass
class BlockScheduler(Generic[A]):
    """The waiting blocks of clients, and those that workers compute.

    `submit` sends a block to a worker's process; `dismiss` ends the process, and the next block starts a new
    one.
    """

    queue: Queue
    workers: int
    submit: Callable[[int, list[str]], Future[Sequence[A]]]
    dismiss: Callable[[int], None]
    tells_clients: bool = True
    _running: dict[Future[Sequence[A]], tuple[int, list[str]]] = field(default_factory=dict)
    _deaths: Counter[str] = field(default_factory=Counter)

    def answers(self) -> Generator[A, None, None]:
        """The workers' answers for all blocks, in order of completion.

        Raises:
            JobError: a block's workers died more than `RETRIES` times.
        """
        try:
            for worker in range(self.workers):
                self._assign(worker)
            while self._running:
                wait(self._running, return_when=FIRST_COMPLETED)
                for future in [future for future in self._running if future.done()]:
                    yield from self._ended(future)
        finally:
            for worker in {worker for worker, _ in self._running.values()}:  # nobody waits for it any more
                self.dismiss(worker)

    def _assign(self, worker: int) -> None:
        """Keep one block queued per worker besides its current one; the last blocks go to idle workers."""
        if worker not in {at_work for at_work, _ in self._running.values()}:
            self._start(worker)
        if len(self.queue) >= self.workers:
            self._start(worker)

    def _start(self, worker: int) -> None:
        block = self.queue.next_for(worker)
        if block is not None:
            self._running[self.submit(worker, block)] = worker, block

    def _ended(self, future: Future[Sequence[A]]) -> Sequence[A]:
        """A worker's answers, after it gets its next block; empty if it died or its process was ended."""
        if future not in self._running:
            return ()
        worker, block = self._running[future]
        answers = _result(future)
        if answers is None:
            self._count_death(block)
            self._take_back(worker)
        else:
            del self._running[future]
        self._assign(worker)
        return answers or ()

    def _count_death(self, block: Sequence[str]) -> None:
        self._deaths[block[0]] += 1
        if self._deaths[block[0]] == RETRIES:
            others = f" and {len(block) - 1} more" if len(block) > 1 else ""
            over = f" over {block[0]}{others}" if self.tells_clients else ""
            raise JobError(f"worker processes died {RETRIES} times{over}; out of memory?")

    def _take_back(self, worker: int) -> None:
        """Put the blocks of a dead worker back into the queue."""
        for lost in [future for future, (at_work, _) in self._running.items() if at_work == worker]:
            self.queue.put(self._running.pop(lost)[1])
        self.dismiss(worker)


def _result(future: Future[Sequence[A]]) -> Sequence[A] | None:
    """A worker's answers; None if it died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None
