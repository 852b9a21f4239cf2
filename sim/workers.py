"""The in-process engine over several worker processes: blocks of clients, the same bits."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Self

from client.books import Books
from client.memory import Memory
from client.site import Shards, Site
from protocol.errors import JobError
from protocol.job import Job
from protocol.messages import (
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from server.roll import Roll
from sim.population import Population
from tasks import trains_on_features

RETRIES = 3
LEDGERS, MEMORY = "ledgers", "memory"
"""Folders of a run's directory: what clients have spent, and what they remember."""

_site: list[Site] = []
"""In a worker process: the site that answers for the simulated clients."""


@dataclass
class PooledCarrier:
    """Deals a cohort to worker processes; a worker that dies is replaced and its block done again."""

    population: Population
    workers: int
    out: Path | None = None
    engine: str = "inline"
    masks: bool = False
    _pool: list[ProcessPoolExecutor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.out is None and self.population.job.remembers:
            raise ValueError("clients that remember move between processes: expected the run's directory")

    def hello(self, job: Job) -> Roll:
        return self.population.roll(job)

    def exchange(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply]:
        """Replies of all blocks, in order of completion.

        Raises:
            JobError: workers keep dying.
        """
        head, body = encode_request(request)
        waiting = blocks(names, self.workers, whole=trains_on_features(self.population.job))
        for _ in range(RETRIES):
            lost: list[list[str]] = []
            with interrupts_held_back():
                running = {self._start().submit(answer, head, body, block): block for block in waiting}
            for future in as_completed(running):
                replies = _result(future)
                if replies is None:
                    lost.append(running[future])
                    continue
                yield from (decode_reply(*reply) for reply in replies)
            if not lost:
                return
            self.close()
            waiting = lost
        raise JobError(f"worker processes died {RETRIES} times over {len(waiting)} blocks; out of memory?")

    def _start(self) -> ProcessPoolExecutor:
        if not self._pool:
            context = multiprocessing.get_context("spawn")
            about = (self.population.job.canonical, self.out)
            self._pool.append(ProcessPoolExecutor(self.workers, context, open_site, about))
        return self._pool[0]

    def close(self) -> None:
        """End the worker processes at once: what they are at is lost, and they hold nothing else."""
        while self._pool:
            pool = self._pool.pop()
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Processes started within never see Ctrl-C: it is for the one that started them to end them."""
    resource_tracker.ensure_running()  # it lets them through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(future: Future[list[tuple[str, bytes]]]) -> list[tuple[str, bytes]] | None:
    """What a worker sent, or nothing if it died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return None


def blocks(names: Sequence[str], workers: int, *, whole: bool) -> list[list[str]]:
    """Consecutive clients for each worker; one by one where clients train one after the other."""
    size = max(1, -(-len(names) // workers)) if whole else 1
    return [list(names[start : start + size]) for start in range(0, len(names), size)]


def open_site(text: str, out: Path | None) -> None:
    """In a new worker process: read the source and wait for work, for as long as the parent lives."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    job = Job.from_json(text)
    _site.append(Site(Population.of(job)) if out is None else site_in(out, Population.of(job)))


def site_in(out: Path, shards: Shards) -> Site:
    """A site of simulated clients whose books and memory are in the run's directory, for all processes."""
    return Site(shards, books=Books(out / LEDGERS), memory=Memory(out / MEMORY, of_one_run=True))


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def answer(head: str, body: bytes, names: list[str]) -> list[tuple[str, bytes]]:
    """In a worker process: the named clients' replies, encoded."""
    return [encode_reply(reply) for reply in _site[0].answer(decode_request(head, body), names)]
