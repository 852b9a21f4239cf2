"""The SuperLink's store of large objects in files: as Flower's own, and nothing lost or left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import sql_mixin
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.object_store import object_store_factory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.object_store import NoObjectInStoreError, ObjectStore
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory

from atoll.server.deploy.object_files import (
    BUSY_MILLISECONDS,
    SMALL_BYTES,
    FileObjectStore,
    keep_objects_in_files,
)

RUN = 2**63 + 11


def content(number: int, size: int) -> bytes:
    """An object of Flower's, of a kind without children."""
    body = number.to_bytes(8, "big") + bytes(size)
    return b"ArrayChunk  %d\0" % len(body) + body


def tree(*objects: bytes) -> ObjectTree:
    """Objects of which the last is the parent of all others."""
    *children, parent = map(get_object_id, objects)
    return ObjectTree(object_id=parent, children=[ObjectTree(object_id=child) for child in children])


@pytest.fixture
def store(tmp_path: Path) -> FileObjectStore:
    return opened(tmp_path)


def opened(folder: Path) -> FileObjectStore:
    made = FileObjectStore(str(folder / "superlink.db"))
    made.initialize()
    return made


def files(folder: Path) -> list[Path]:
    return sorted((folder / "objects").iterdir())


LARGE, OTHER, SMALL = content(1, SMALL_BYTES), content(2, SMALL_BYTES + 5), content(3, 100)


def test_a_large_object_is_a_file_and_a_small_one_is_not(store: FileObjectStore, tmp_path: Path) -> None:
    store.preregister(RUN, tree(LARGE, SMALL))
    for one in (LARGE, SMALL):
        store.put(get_object_id(one), one)
        assert store.get(get_object_id(one)) == one
    assert [path.read_bytes() for path in files(tmp_path)] == [LARGE]
    assert (tmp_path / "objects").stat().st_mode & 0o077 == 0
    store.put(get_object_id(LARGE), LARGE)  # again, as a site does whose connection broke
    assert len(files(tmp_path)) == 1
    store.delete(get_object_id(SMALL))
    assert files(tmp_path) == [] and len(store) == 0


def test_what_is_false_or_not_waited_for_leaves_no_file(store: FileObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not match"):
        store.put(get_object_id(OTHER), LARGE)
    with pytest.raises(NoObjectInStoreError):
        store.put(get_object_id(LARGE), LARGE)
    assert files(tmp_path) == [] and store.get(get_object_id(LARGE)) is None


def test_a_file_goes_only_with_its_row(store: FileObjectStore, tmp_path: Path) -> None:
    store.preregister(RUN, tree(LARGE, SMALL))
    store.put(get_object_id(LARGE), LARGE)

    def undone() -> None:
        with store.session():
            store.delete(get_object_id(SMALL))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        undone()
    assert store.get(get_object_id(LARGE)) == LARGE
    store.delete_objects_in_run(RUN)
    assert files(tmp_path) == [] and len(store) == 0


def test_after_a_kill_what_a_row_names_is_there_and_nothing_else(
    store: FileObjectStore, tmp_path: Path
) -> None:
    store.preregister(RUN, tree(LARGE, OTHER, SMALL))
    store.put(get_object_id(LARGE), LARGE)
    store.put(get_object_id(OTHER), OTHER)
    (tmp_path / "objects" / "torn").write_bytes(b"half")
    next(path for path in files(tmp_path) if path.read_bytes() == OTHER).unlink()  # as when the power fails
    again = opened(tmp_path)
    assert again.get(get_object_id(LARGE)) == LARGE and [p.read_bytes() for p in files(tmp_path)] == [LARGE]
    assert again.get(get_object_id(OTHER)) is None
    again.clear()
    assert files(tmp_path) == []


def answer(store: ObjectStore, act: str, one: bytes, message: ObjectTree) -> object:
    """What a store says to one call, or which error it raises."""
    acts: dict[str, Callable[[], object]] = {
        "register": lambda: sorted(store.preregister(RUN, message)),
        "put": lambda: store.put(get_object_id(one), one),
        "get": lambda: store.get(get_object_id(one)),
        "delete": lambda: store.delete(message.object_id),
        "holds": lambda: (message.object_id in store, len(store)),
    }
    try:
        return acts[act]()
    except (NoObjectInStoreError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("seed", range(4))
def test_it_answers_as_flowers_own_store_in_memory(tmp_path: Path, seed: int) -> None:
    """Random messages that share parts are registered, sent, read and deleted in any order."""
    draw, ours, theirs = random.Random(seed), opened(tmp_path), InMemoryObjectStore()
    parts = [content(n, SMALL_BYTES if n % 2 else 10) for n in range(6)]
    heads = [content(100 + n, 10) for n in range(5)]
    messages = [tree(*draw.sample(parts, 3), head) for head in heads]
    for _ in range(150):
        call = (
            draw.choice(("register", "put", "get", "delete", "holds")),
            draw.choice([*parts, *heads]),
            draw.choice(messages),
        )
        assert answer(ours, *call) == answer(theirs, *call), call[0]
    there = {bytes(one) for one in parts if len(one) > SMALL_BYTES and theirs.get(get_object_id(one))}
    assert {path.read_bytes() for path in files(tmp_path)} == there


def test_the_superlink_uses_it_and_waits_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module, name in ((object_store_factory, "SqlObjectStore"), (sql_mixin, "SQLITE_PRAGMAS")):
        monkeypatch.setattr(module, name, vars(module)[name])
    keep_objects_in_files()
    made = ObjectStoreFactory(str(tmp_path / "superlink.db")).store()
    assert isinstance(made, FileObjectStore)
    [row] = made.query("PRAGMA busy_timeout")
    assert list(row.values()) == [BUSY_MILLISECONDS]
