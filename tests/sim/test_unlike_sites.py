"""Sites whose data are unlike: other classes at each, in another order, and fewer examples than a batch."""

from __future__ import annotations

from pathlib import Path

from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from tests.server.rounds.test_received import setting
from tests.support.memory_grid import MemoryGrid

UNLIKE = {"partition": {"kind": "pathological", "classes_per_client": 6}}


def test_a_class_is_one_class_wherever_it_is_and_a_batch_may_be_larger_than_a_shard(tmp_path: Path) -> None:
    """Each site reads its own folders of six classes; the simulation deals out rows of all ten."""
    job = setting(4, data=UNLIKE, train={"batch_size": 4096, "lr": 0.1}, federation={"rounds": 2})
    grid = MemoryGrid.of(job, tmp_path / "sites")
    for name in grid.sites:
        assert len([*(tmp_path / "sites" / "shards" / name).rglob("[0-9]")]) == 6
    result = grid.run(job, tmp_path / "real")
    expected = simulate(job, tmp_path / "simulated", on_event=ignore_events, report=False)
    assert result.model_sha256 == expected.model_sha256
    assert result.facts["classes"] == [str(digit) for digit in range(10)]
