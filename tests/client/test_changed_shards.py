"""A run is answered with the data with which it began or not at all, however often its site is restarted."""

from __future__ import annotations

import shutil
from pathlib import Path

from atoll.client.local_data import FolderShards
from atoll.client.redaction import CHANGED
from atoll.client.site import Site
from atoll.client.state.store import ClientStateStore
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.protocol.messages import Failure, Reply, Update
from atoll.protocol.requests import TrainRequest
from atoll.tasks import task_named
from tests.tasks.test_data_info import pictures

SETTING = Job.parse(
    {
        "name": "rows",
        "seed": 1,
        "task": {"name": "image-classification"},
        "data": {"source": "digits", "validation_fraction": 0},
        "backbone": {"name": "raw:pixels", "image_size": 8},
        "federation": {"clients": 2},
    },
    origin="test",
)


def shard(folder: Path, labels: list[str]) -> None:
    """A picture for each label; what was there before is replaced."""
    if folder.exists():
        shutil.rmtree(folder)
    pictures(folder, labels)


def restarted(folder: Path) -> Site:
    """A site as a new process has it: nothing in memory, all that was kept on disk."""
    memory = ClientStateStore(folder / "memory")
    return Site(FolderShards.of("north", [folder / "data"]), discreet=True, memory=memory)


def reply_of(site: Site, run: str, round: int) -> Reply:
    facts = {"classes": ["p", "q"]}
    tensors = Learner.of(SETTING, task_named(SETTING.task.name), facts).initial()
    [reply] = site.answer(
        TrainRequest(SETTING.canonical, SETTING.hash, round, facts, tensors, run=run), ["north"]
    )
    return reply


def test_data_that_changed_while_the_site_was_down_is_refused_until_the_next_run(tmp_path: Path) -> None:
    shard(tmp_path / "data", ["p", "q", "p"])
    first = reply_of(restarted(tmp_path), "run", 1)
    assert isinstance(first, Update)
    shard(tmp_path / "data", ["p", "q", "q"])
    site = restarted(tmp_path)
    site.hello(SETTING)  # as after a restart of the server, which goes on with the run
    assert reply_of(site, "run", 2) == Failure("north", CHANGED)
    other = reply_of(site, "next run", 1)
    assert isinstance(other, Update)
    shard(tmp_path / "data", ["p", "q", "p"])  # the same content in other files
    again = reply_of(restarted(tmp_path), "run", 1)
    assert isinstance(again, Update)
    assert all(bool((again.delta[name] == first.delta[name]).all()) for name in first.delta)
    assert any(bool((other.delta[name] != first.delta[name]).any()) for name in first.delta)
