"""A round's work at worker processes: every block is done once, whoever dies on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import pytest

from atoll.errors import JobError
from atoll.sim.engines.affinity import Queue, WorkerAffinity
from atoll.sim.engines.scheduler import BlockScheduler


@dataclass
class Workers:
    """Workers that finish or die as `then` has it, which is told of every block that one of them gets."""

    then: Callable[[Workers, int], None]
    count: int = 2
    at: defaultdict[int, list[tuple[list[str], Future[list[str]]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    dismissed: list[int] = field(default_factory=list)
    dispatched: list[tuple[int, str]] = field(default_factory=list)

    def submit(self, worker: int, block: list[str]) -> Future[list[str]]:
        future: Future[list[str]] = Future()
        self.at[worker].append((block, future))
        self.dispatched.append((worker, block[0]))
        self.then(self, worker)
        return future

    def dismiss(self, worker: int) -> None:
        self.at.pop(worker, None)
        self.dismissed.append(worker)

    def finish(self, worker: int) -> None:
        block, future = self.at[worker].pop(0)
        future.set_result([f"{name}!" for name in block])

    def die(self, worker: int) -> None:
        for _, future in self.at[worker]:
            future.set_exception(BrokenProcessPool())

    def answers(self, *blocks: list[str]) -> Generator[str, None, None]:
        return BlockScheduler(
            Queue(WorkerAffinity(), blocks), self.count, self.submit, self.dismiss
        ).answers()


def names(count: int) -> list[list[str]]:
    return [[f"c{i}"] for i in range(count)]


def test_a_worker_has_a_block_and_one_at_its_door_and_the_last_ones_go_to_who_is_free() -> None:
    def then(crew: Workers, worker: int) -> None:
        if len(crew.dispatched) == 4:
            crew.finish(0)

    crew = Workers(then)
    answers = crew.answers(*names(6))
    assert next(answers) == "c0!"
    # 0 is at c1, and 1 at c2 with c3 at its door. Two are left: one goes to 0's door, one stays.
    assert crew.dispatched == [(0, "c0"), (0, "c1"), (1, "c2"), (1, "c3"), (0, "c4")]
    crew.finish(0)
    assert next(answers) == "c1!" and len(crew.dispatched) == 5
    crew.finish(0)
    assert next(answers) == "c4!" and crew.dispatched[-1] == (0, "c5")
    for worker in (0, 1, 1):
        crew.finish(worker)
    assert sorted(answers) == ["c2!", "c3!", "c5!"] and not crew.dismissed


def test_a_dead_workers_blocks_are_done_again() -> None:
    def then(crew: Workers, worker: int) -> None:
        if len(crew.dispatched) == 2:
            crew.die(0)  # with c0 at work and c1 at its door
        elif len(crew.dispatched) > 2:
            crew.finish(worker)

    crew = Workers(then)
    assert sorted(crew.answers(*names(4))) == ["c0!", "c1!", "c2!", "c3!"]
    assert crew.dismissed == [0]
    assert sorted(name for _, name in crew.dispatched) == ["c0", "c0", "c1", "c1", "c2", "c3"]


def test_a_block_that_kills_every_worker_ends_the_round() -> None:
    crew = Workers(Workers.die, count=1)
    with pytest.raises(JobError, match="died 3 times over deadly and 1 more; out of memory"):
        list(crew.answers(["deadly", "other"]))
    assert len(crew.dispatched) == 3


def test_who_stops_listening_ends_the_workers_that_are_still_at_it() -> None:
    def then(crew: Workers, worker: int) -> None:
        if worker == 0:
            crew.finish(0)

    crew = Workers(then)
    answers = crew.answers(*names(2))
    assert next(answers) == "c0!"
    answers.close()
    assert crew.dismissed == [1]


def test_an_error_that_isnt_a_death_ends_the_round() -> None:
    def then(crew: Workers, worker: int) -> None:
        crew.at[worker][0][1].set_exception(ZeroDivisionError())

    crew = Workers(then, count=1)
    with pytest.raises(ZeroDivisionError):
        list(crew.answers(*names(1)))
    assert crew.dismissed == [0]
