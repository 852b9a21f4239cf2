"""The in-process engine over several worker processes: blocks of clients, the same bits.

Models and updates lie in memory that the processes share, where the system has such memory; large updates
lie in files of the run's directory. Everything else is sent as messages.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.client.site import Site
from atoll.client.state.store import ClientStateStore
from atoll.job.job import Job
from atoll.job.privacy import unless_secret
from atoll.kit.roster import FederationRoster
from atoll.learning.determinism import use_shared_gpu
from atoll.protocol.messages import Reply, Update, decode_reply, encode_reply
from atoll.protocol.requests import ModelRequest, Request, decode_request, encode_request
from atoll.protocol.tensors import Tensors
from atoll.protocol.updates_on_disk import WrittenTensors, is_large, taken, written
from atoll.server.roster import ClientRoster
from atoll.server.run.directory import UPDATES
from atoll.sim.engines.affinity import Queue, WorkerAffinity
from atoll.sim.engines.scheduler import BlockScheduler
from atoll.sim.engines.shared_memory import Layout, SharedTensorSlots, can_share
from atoll.sim.engines.simulated_site import SimulatedSite
from atoll.sim.population.population import Population
from atoll.system.fork_server import import_first, worker_pool
from atoll.tasks import trains_on_features
from atoll.tasks.imports import imports_of

LEDGERS, MEMORY = "ledgers", "memory"
"""Folders of a run's directory: the clients' privacy ledgers and their stored state."""

MODEL = 0
"""The slot of shared memory for the tensors of a request; the other slots are the clients'."""

_site: list[Site] = []
"""In a worker process: the site that answers for the simulated clients."""

_board: list[SharedTensorSlots] = []
"""In a worker process: the shared memory that it has open."""


@dataclass(frozen=True)
class Work:
    """A request for some clients: the message, and the clients' slots of shared memory, if there is any."""

    head: str
    body: bytes
    slots: dict[str, int]
    shared: Layout | None = None
    updates: Path | None = None
    """The folder for large updates."""


@dataclass(frozen=True)
class Answer:
    """A reply as a message; an update's delta may lie in its client's slot or in a file instead."""

    head: str
    body: bytes
    in_slot: bool = False
    file: WrittenTensors | None = None


@dataclass
class PooledTransport:
    """A transport to worker processes; a worker that dies is replaced, and its block computed again."""

    population: Population
    workers: int
    out: Path | None = None
    engine: str = "inline"
    uses_masking: bool = False
    roster: FederationRoster | None = None
    _pools: dict[int, ProcessPoolExecutor] = field(default_factory=dict)
    """Pools of one process each, so that a client can be sent to the worker that had it before."""
    _homes: WorkerAffinity = field(default_factory=WorkerAffinity)
    _board: list[SharedTensorSlots] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.out is None and self.population.job.has_client_state:
            raise ValueError("clients that remember move between processes: expected the run's directory")

    def discover_clients(self, job: Job) -> ClientRoster:
        return self.population.roster(job)

    def send_and_receive(
        self, request: Request, names: Sequence[str], timeout: float
    ) -> Generator[Reply, None, None]:
        """The replies of all blocks, in order of completion; updates are valid until the next call.

        Raises:
            JobError: a block's workers died too often.
        """
        board = updates = None
        if isinstance(request, ModelRequest):
            updates = None if self.out is None or not is_large(request.tensors) else self.out / UPDATES
            board = self._board_for(request.tensors, 1 if updates else len(names) + 1)
            if board is not None:
                board.put(MODEL, request.tensors)
                request = replace(request, tensors={})
        head, body = encode_request(request)
        shared = None if board is None else board.layout
        slots = {name: number for number, name in enumerate(names, start=MODEL + 1)}

        def submit(worker: int, block: list[str]) -> Future[Sequence[Answer]]:
            work = Work(head, body, {name: slots[name] for name in block}, shared, updates)
            try:
                return self._pool(worker).submit(answer, work)
            except BrokenProcessPool:  # it died while it had nothing to do
                self._end_worker(worker)
                return self._pool(worker).submit(answer, work)

        waiting = blocks(names, self.workers, whole=trains_on_features(self.population.job))
        shift = BlockScheduler(
            Queue(self._homes, waiting), self.workers, submit, self._end_worker,
            tells_clients=unless_secret(self.population.job, True, False),
        )  # fmt: skip
        with closing(shift.answers()) as answers:
            yield from (_reply(each, board, slots) for each in answers)

    def _board_for(self, model: Tensors, slots: int) -> SharedTensorSlots | None:
        """Shared memory for the request's and the replies' tensors; None without tensors or such memory."""
        if not model or not can_share():
            return None
        if not self._board or not self._board[0].fits(model, slots):
            self._let_go()
            self._board.append(SharedTensorSlots.like(model, slots))
        return self._board[0]

    def _let_go(self) -> None:
        while self._board:
            self._board.pop().close()

    def _pool(self, worker: int) -> ProcessPoolExecutor:
        if worker not in self._pools:
            import_first("atoll.sim.engines.process_pool", *imports_of(self.population.job))
            self._pools[worker] = worker_pool(1, open_site, self.population.job.canonical, self.out, worker)
        return self._pools[worker]

    def close(self) -> None:
        """End the worker processes at once, and release the shared memory."""
        for worker in list(self._pools):
            self._end_worker(worker)
        self._let_go()

    def _end_worker(self, worker: int) -> None:
        """End a worker at once; only its present work is lost."""
        end_processes(self._pools.pop(worker))
        self._homes.forget(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def end_processes(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes at once, in the middle of any work."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def _reply(answer: Answer, board: SharedTensorSlots | None, slots: dict[str, int]) -> Reply:
    """A worker's answer as a reply, whose tensors are mapped from where the worker wrote them."""
    reply = decode_reply(answer.head, answer.body)
    if answer.file is not None and isinstance(reply, Update):
        return replace(reply, delta=taken(answer.file))
    if answer.in_slot and isinstance(reply, Update) and board is not None:
        return replace(reply, delta=board.tensors(slots[reply.client]))
    return reply


def blocks(names: Sequence[str], workers: int, *, whole: bool) -> list[list[str]]:
    """The names in blocks of consecutive clients: one per worker if `whole`, else one per client."""
    size = max(1, -(-len(names) // workers)) if whole else 1
    return [list(names[start : start + size]) for start in range(0, len(names), size)]


def processes_for(jobs: Iterable[Job]) -> int:
    """The number of processes that fit on the usable cores, each with as many threads as the jobs need."""
    return max(1, len(os.sched_getaffinity(0)) // max(job.train.threads for job in jobs))


def open_site(text: str, out: Path | None, worker: int) -> None:
    """In a new worker process: read the source and wait for work; of several GPUs use its own."""
    job = Job.from_json(text)
    use_shared_gpu(job.train.device, worker)
    population = Population.of(job)
    ledgers, memory = (None, ClientStateStore()) if out is None else books_in(out)
    _site.append(SimulatedSite(population, ledgers=ledgers, memory=memory, population=population))


def books_in(out: Path) -> tuple[PrivacyLedgers, ClientStateStore]:
    """The simulated clients' privacy ledgers and state store in a run's directory, for all its processes."""
    return PrivacyLedgers(out / LEDGERS), ClientStateStore(out / MEMORY, of_one_run=True)


def answer(work: Work) -> list[Answer]:
    """In a worker process: the replies of the work's clients."""
    request = decode_request(work.head, work.body)
    board = None if work.shared is None else _opened(work.shared)
    if board is not None and isinstance(request, ModelRequest):
        request = replace(request, tensors=board.tensors(MODEL))
    replies = _site[0].answer(request, list(work.slots))
    return [_answered(reply, board, work) for reply in replies]


def _opened(layout: Layout) -> SharedTensorSlots:
    if not _board or _board[0].layout != layout:
        _board[:] = [SharedTensorSlots.opened(layout)]
    return _board[0]


def _answered(reply: Reply, board: SharedTensorSlots | None, work: Work) -> Answer:
    if not isinstance(reply, Update):
        return Answer(*encode_reply(reply))
    if work.updates is not None:
        file = written(reply.delta, work.updates)
        return Answer(*encode_reply(replace(reply, delta={})), file=file)
    if board is None or not board.fits(reply.delta, 0):
        return Answer(*encode_reply(reply))
    board.put(work.slots[reply.client], reply.delta)
    return Answer(*encode_reply(replace(reply, delta={})), in_slot=True)
