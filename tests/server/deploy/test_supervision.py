"""Runs whose process died: when they are started again, how often, and what is told of them."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from atoll.errors import ConfigError
from atoll.server.deploy.status import Run
from atoll.server.deploy.supervision import (
    LINGER_SECONDS,
    MOST_DEATHS,
    Record,
    RunSupervisor,
    became,
    process_file,
)
from atoll.system.lock import end_holder, hold, is_held

DIED = {"status": "finished", "outcome": "failed", "details": "No heartbeat received", "died": True}
STOPPED = {"status": "finished", "outcome": "stopped"}


@dataclass
class SuperLink:
    """Runs by id, as Flower's has them."""

    stands: dict[int, Run] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    refused: bool = False

    def run(self, run_id: int) -> Run:
        return self.stands[run_id]

    def runs(self, limit: int = 20) -> list[Run]:
        return list(reversed(self.stands.values()))[:limit]

    def config(self, run_id: int) -> tuple[str, str]:
        return "{}" if self.places[run_id] else "", self.places[run_id]

    def start_job(self, job: str, out: str) -> int:
        if self.refused:
            raise ConfigError("my-strategy is not installed")
        run_id = len(self.stands) + 1
        self.stands[run_id] = Run(run_id, "running", "", "", f"2026-01-01T00:00:{run_id:02d}")
        self.places[run_id] = out
        return run_id

    def stop(self, run_id: int) -> bool:
        self.becomes(run_id, **STOPPED)
        return True

    def becomes(self, run_id: int, **changes: Any) -> None:
        self.stands[run_id] = replace(self.stands[run_id], **changes)


@dataclass
class Scene:
    """A SuperLink and the supervisor of its runs, whose clock stands unless it is turned."""

    folder: Path
    link: SuperLink = field(default_factory=SuperLink)
    lines: list[str] = field(default_factory=list)
    now: float = 0.0
    supervisor: RunSupervisor = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "state").mkdir()
        self.restart()

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def restart(self) -> None:
        """The server's own process is another one."""
        self.supervisor = RunSupervisor(self.state, self.link, self.lines.append, lambda: self.now)

    def look(self) -> None:
        self.supervisor.look(self.link.runs(1))

    def started(self) -> int:
        run_id = self.link.start_job("{}", str(self.folder / "out"))
        self.look()
        return run_id

    def begun(self) -> int:
        """A run whose process has been there, and is dead."""
        run_id = self.started()
        hold(process_file(self.state, run_id)).close()
        return run_id


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_dead_process_is_seen_at_the_second_look_and_its_run_goes_on(scene: Scene) -> None:
    first = scene.begun()
    (scene.folder / "out").mkdir()
    (scene.folder / "out" / "metrics.jsonl").write_text("{}\n{}\n")
    scene.look()
    assert not scene.lines and not scene.link.run(first).finished  # it may have told its end before it died
    scene.look()
    assert scene.lines == ["the process of run 1 died; it goes on as run 2"]
    assert scene.link.run(1).outcome == "stopped" and scene.link.places[2] == str(scene.folder / "out")
    assert became(scene.state, scene.link.run(1)) == 2
    assert not process_file(scene.state, 1).exists()
    scene.look()
    assert len(scene.lines) == 1


def test_a_process_that_told_its_end_before_it_died_is_left_alone(scene: Scene) -> None:
    for end in ({"outcome": "completed"}, {"outcome": "failed", "details": "below the quorum"}, STOPPED):
        run_id = scene.begun()
        scene.look()
        scene.link.becomes(run_id, **{"status": "finished", **end})
        scene.look(), scene.look()
        assert became(scene.state, scene.link.run(run_id)) == scene.link.run(run_id)
    assert scene.lines == [] and len(scene.link.stands) == 3
    assert Record.load(scene.state).going_on == {}


def test_a_run_that_the_superlink_gave_up_goes_on_though_its_process_never_began(scene: Scene) -> None:
    run_id = scene.started()
    scene.link.becomes(run_id, **DIED)
    assert became(scene.state, scene.link.run(run_id)) is None  # whoever follows it waits
    scene.look()
    assert scene.lines == ["the process of run 1 died; it goes on as run 2"]


@pytest.mark.processes
def test_a_process_that_lives_is_waited_for_and_then_killed(scene: Scene) -> None:
    run_id = scene.started()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold_for_ever, args=(process_file(scene.state, run_id), ready))
    process.start()
    assert ready.wait(600)
    scene.look(), scene.look()
    assert not scene.lines
    scene.link.becomes(run_id, **DIED)
    scene.look()
    scene.now += LINGER_SECONDS
    scene.look()
    assert process.is_alive() and not scene.lines
    scene.now += 1
    scene.look()
    process.join(600)
    assert process.exitcode == -9
    scene.look()
    assert scene.lines[-1].endswith("as run 2")


def _hold_for_ever(path: Path, ready: Any) -> None:
    held = hold(path)
    ready.set()
    while not held.closed:
        os.read(os.pipe()[0], 1)


def test_a_run_that_dies_again_and_again_is_given_up_unless_it_gets_on(scene: Scene) -> None:
    scene.begun()
    log = scene.folder / "out" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text("{}\n")
    pauses: list[float] = []
    for death in range(1, MOST_DEATHS + 4):
        latest = max(scene.link.stands)
        if death == 3:
            log.write_text("{}\n" * 2)  # a round was whole: the count begins anew
        scene.link.becomes(latest, **DIED)
        began = scene.now
        while max(scene.link.stands) == latest and Record.load(scene.state).going_on:
            scene.look()
            scene.now += 0.5
        pauses.append(scene.now - began - 0.5)
    assert pauses == [0, 1, 0, 1, 2, 4, 8, 0]
    last = scene.link.run(max(scene.link.stands))
    end = became(scene.state, last)
    assert isinstance(end, Run) and end.details == (
        "its process died 6 times after round 2; once what kills it is mended, it goes on with"
        " atoll submit --resume"
    )
    assert scene.lines[-1] == f"run {last.run_id}: {end.details}"


def test_a_server_that_was_killed_finds_its_runs_dead_and_goes_on_with_them(scene: Scene) -> None:
    scene.begun()
    scene.restart()
    scene.look(), scene.look()
    assert scene.lines == ["the process of run 1 died; it goes on as run 2"]


@pytest.mark.parametrize("started", [False, True])
def test_a_server_killed_while_it_starts_a_run_again_starts_it_once(scene: Scene, started: bool) -> None:
    scene.begun()
    begin = scene.link.start_job

    def killed(job: str, out: str) -> int:
        if started:
            begin(job, out)
        raise KeyboardInterrupt

    scene.link.start_job = killed  # type: ignore[method-assign]
    scene.look()
    with pytest.raises(KeyboardInterrupt):
        scene.look()
    assert became(scene.state, scene.link.run(1)) is None
    scene.link.start_job = begin  # type: ignore[method-assign]
    scene.restart()
    scene.look()
    assert list(scene.link.stands) == [1, 2] and Record.load(scene.state).latest(1) == 2


def test_what_can_no_longer_be_started_says_why(scene: Scene) -> None:
    scene.begun()
    scene.link.refused = True
    scene.look(), scene.look()
    assert scene.lines == [
        "run 1: its process died, and it cannot be started again: my-strategy is not installed"
    ]


def test_another_apps_runs_and_unknown_old_ones_are_left_alone(scene: Scene) -> None:
    scene.link.start_job("", "")
    scene.look(), scene.look()
    scene.link.becomes(1, **DIED)
    old = scene.link.start_job("{}", str(scene.folder / "out"))
    scene.link.becomes(old, **DIED)  # before this server kept a record
    scene.look()
    assert scene.lines == [] and not Record.load(scene.state).going_on


def test_a_damaged_record_is_named(scene: Scene) -> None:
    (scene.state / "runs.json").write_text("{")
    with pytest.raises(ConfigError, match=r"runs\.json: cannot be read"):
        scene.restart()


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "state" / "a.pid"
    assert is_held(path) is None
    end_holder(path)
    with hold(path):
        assert is_held(path) is True
    assert is_held(path) is False
    end_holder(path)
