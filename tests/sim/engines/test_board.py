"""Memory that processes share: what one puts there another one finds, in the same bits."""

from pathlib import Path

import pytest
import torch

from atoll.protocol.tensors import Tensors, tensors_sha256
from atoll.sim.engines.shared_memory import Layout, SharedTensorSlots, can_share
from atoll.system.fork_server import worker_pool

pytestmark = pytest.mark.skipif(not can_share(), reason="this system has no memory to share")

MODEL: Tensors = {
    "a": torch.linspace(0, 1, 7),
    "b": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
}


def negated(layout: Layout) -> str:
    """In another process: what is in slot 0, by its hash; its negative is put into slot 2."""
    board = SharedTensorSlots.opened(layout)
    found = board.tensors(0)
    board.put(2, {name: -t for name, t in found.items()})
    return tensors_sha256(found)


@pytest.mark.processes
def test_another_process_finds_the_same_bits_and_leaves_its_own() -> None:
    board = SharedTensorSlots.like(MODEL, 3)
    board.put(0, MODEL)
    with worker_pool(1, int) as pool:
        assert pool.submit(negated, board.layout).result() == tensors_sha256(MODEL)
    assert tensors_sha256(board.tensors(2)) == tensors_sha256({n: -t for n, t in MODEL.items()})
    assert tensors_sha256(board.tensors(0)) == tensors_sha256(MODEL)
    assert all(not t.to(torch.float64).any() for t in board.tensors(1).values())
    board.close()


def test_a_board_takes_only_tensors_like_its_own() -> None:
    board = SharedTensorSlots.like(MODEL, 2)
    assert board.fits(MODEL, 2)
    assert not board.fits(MODEL, 3)
    assert not board.fits({**MODEL, "a": torch.zeros(8)}, 1)
    assert not board.fits({**MODEL, "a": torch.zeros(7, dtype=torch.float64)}, 1)
    assert not board.fits({"a": MODEL["a"]}, 1)
    board.close()


def test_the_memory_has_no_name_and_outlives_neither_board_nor_views() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    board = SharedTensorSlots.like(MODEL, 1)
    board.put(0, MODEL)
    view = board.tensors(0)["a"]
    board.close()
    assert (view == MODEL["a"]).all()  # still mapped, for there is a view
    del view, board
    assert len(list(Path("/proc/self/fd").iterdir())) == before
