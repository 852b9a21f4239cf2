"""Blocks of clients go to the worker that knows them, and none waits while a worker is idle."""

from __future__ import annotations

from atoll.sim.engines import affinity
from atoll.sim.engines.affinity import Queue, WorkerAffinity


def dealt(queue: Queue, turns: list[int]) -> dict[str, int]:
    """Who got which client, where workers ask in that order."""
    found = {}
    for worker in turns:
        block = queue.next_for(worker)
        assert block is not None
        found |= dict.fromkeys(block, worker)
    return found


def test_new_blocks_come_in_their_order() -> None:
    queue = Queue(WorkerAffinity(), [["a", "b"], ["c"], ["d"]])
    assert len(queue) == 3
    assert [queue.next_for(w) for w in (1, 0, 1)] == [["a", "b"], ["c"], ["d"]]
    assert queue.next_for(0) is None and len(queue) == 0
    queue.put(["e"])
    assert len(queue) == 1 and queue.next_for(0) == ["e"]


def test_a_client_goes_where_it_was() -> None:
    homes = WorkerAffinity()
    first = dealt(Queue(homes, [["a"], ["b"], ["c"], ["d"]]), [0, 1, 1, 0])
    again = dealt(Queue(homes, [["d"], ["c"], ["b"], ["a"]]), [1, 0, 0, 1])
    assert again == first == {"a": 0, "b": 1, "c": 1, "d": 0}


def test_who_is_new_comes_first_then_who_is_known_then_who_is_known_elsewhere() -> None:
    homes = WorkerAffinity()
    dealt(Queue(homes, [["a"], ["b"], ["c"]]), [0, 1, 0])
    queue = Queue(homes, [["a"], ["b"], ["new"], ["c"]])
    assert [queue.next_for(1) for _ in range(5)] == [["new"], ["b"], ["a"], ["c"], None]
    assert homes.of(["a"]) == 1


def test_it_takes_from_the_one_that_has_the_most_to_do() -> None:
    homes = WorkerAffinity()
    dealt(Queue(homes, [["a"], ["b"], ["c"]]), [0, 1, 1])
    assert Queue(homes, [["a"], ["b"], ["c"]]).next_for(2) == ["b"]


def test_a_worker_that_is_new_knows_nobody() -> None:
    homes = WorkerAffinity()
    dealt(Queue(homes, [["a"], ["b"]]), [0, 1])
    homes.forget(0)
    assert homes.of(["a"]) is None and homes.of(["b"]) == 1


def test_of_very_many_clients_the_oldest_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr(affinity, "KNOWN_CLIENTS", 2)
    homes = WorkerAffinity()
    dealt(Queue(homes, [["a"], ["b"], ["a"], ["c"]]), [0, 0, 0, 0])
    assert [homes.of([name]) for name in "abc"] == [0, None, 0]
