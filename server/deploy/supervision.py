"""Runs that go on after their process died: started again after their last whole round, under a new id.

A run's process holds a lock file of its own, so that its death is seen at once, also by a server that has
been started anew itself. What is known of each run is in the kit's `state/runs.json`, which the server alone
writes: `submit`, `logs`, `stop` and `status` read there what became of a run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from atoll.errors import ConfigError
from atoll.server.deploy.status import Run
from atoll.system.durable_files import remove, replace_synced
from atoll.system.lock import end_holder, is_held

logger = logging.getLogger(__name__)

RECORD = "runs.json"
MOST_DEATHS = 5
"""So often a run is started again without a whole round in between; then something else is wrong."""
TOO_OFTEN = (
    "its process died {deaths} times after round {rounds}; once what kills it is mended, it goes on with"
    " atoll submit --resume"
)
LINGER_SECONDS = 20.0
"""What a process has to end by itself, once its run counts as ended."""
KEPT = 200
"""How many runs that went on under another id are remembered."""


class Control(Protocol):
    """What is asked of Flower's SuperLink."""

    def run(self, run_id: int) -> Run:
        """How one run stands."""

    def runs(self, limit: int = 20) -> list[Run]:
        """The latest runs, newest first."""

    def config(self, run_id: int) -> tuple[str, str]:
        """A run's job and its run directory."""

    def start_job(self, job: str, out: str) -> int:
        """Start a run; returns its id."""

    def stop(self, run_id: int) -> bool:
        """Whether the run was stopped by this call."""


class Going(BaseModel):
    """A run that is to come to its end."""

    model_config = ConfigDict(extra="forbid")

    job: str
    out: str
    rounds: int = 0
    """Whole rounds when it was last started."""
    deaths: int = 0
    """How often its process has died since."""
    restarting: bool = False
    """Whether its next start is under way: it may have happened, should this server have died then."""


class Record(BaseModel):
    """What became of runs, by id."""

    model_config = ConfigDict(extra="forbid")

    going_on: dict[int, Going] = {}
    continued: dict[int, int] = {}
    """The id under which each goes on."""
    given_up: dict[int, str] = {}
    """Why it isn't started again."""

    @classmethod
    def load(cls, state: Path) -> Record:
        """The record in a kit's state folder; an empty one where there is none.

        Raises:
            ConfigError: it can't be read.
        """
        path = state / RECORD
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None

    def save(self, state: Path) -> None:
        """Write it, on the disk when this returns."""
        for table in (self.continued, self.given_up):
            for run_id in list(table)[:-KEPT]:
                del table[run_id]
        replace_synced(state / RECORD, self.model_dump_json(indent=1).encode())

    def latest(self, run_id: int) -> int:
        """The id under which the run goes on now, or went on last."""
        while run_id in self.continued:
            run_id = self.continued[run_id]
        return run_id


def process_file(state: Path, run_id: int) -> Path:
    """The file that a run's process holds locked for as long as it lives."""
    return state / "runs" / f"{run_id}.pid"


@dataclass
class RunSupervisor:
    """Sees to it that every run comes to an end of its own: a result, an error that it tells, or a stop."""

    state: Path
    control: Control
    tell: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    record: Record = field(init=False)
    dead: dict[int, float] = field(default_factory=dict)
    """Since when each run's process is known to be dead."""
    lingering: dict[int, float] = field(default_factory=dict)
    """Since when each process lives whose run has ended."""

    def __post_init__(self) -> None:
        self.record = Record.load(self.state)

    def look(self, runs: Iterable[Run]) -> None:
        """Take note of how runs stand, and start again those whose process died.

        Raises:
            JobError: the SuperLink doesn't answer; the next look goes on.
        """
        seen = {run.run_id: run for run in runs}
        for run in seen.values():
            if not run.finished and run.run_id not in self.record.going_on:
                self._begin(run.run_id)
        for run_id in list(self.record.going_on):
            self._look_at(seen[run_id] if run_id in seen else self.control.run(run_id))

    def _begin(self, run_id: int) -> None:
        job, out = self.control.config(run_id)
        if out:  # it may be another app's, which is left alone
            self.record.going_on[run_id] = Going(job=job, out=out, rounds=whole_rounds(out))
            self.record.save(self.state)

    def _look_at(self, run: Run) -> None:
        if self.record.going_on[run.run_id].restarting:
            self._start_again(run.run_id)
            return
        if run.finished and not run.died:
            self._forget(run.run_id)
            return
        lives = is_held(process_file(self.state, run.run_id))
        if lives and run.finished:
            self._end_process(run.run_id)
        elif run.finished or (lives is False and self._is_dead(run.run_id)):
            self._go_on(run)

    def _is_dead(self, run_id: int) -> bool:
        """Whether the process was dead at an earlier look, after which the run still hadn't ended.

        A process tells how its run ended before it ends itself.
        """
        is_known = run_id in self.dead
        self.dead.setdefault(run_id, self.clock())
        return is_known

    def _end_process(self, run_id: int) -> None:
        """Wait for a process whose run counts as ended, for it holds the run directory; then kill it."""
        since = self.lingering.setdefault(run_id, self.clock())
        if self.clock() - since > LINGER_SECONDS:
            logger.warning("the process of run %d does not end; killing it", run_id)
            end_holder(process_file(self.state, run_id))

    def _go_on(self, run: Run) -> None:
        going = self.record.going_on[run.run_id]
        rounds = whole_rounds(going.out)
        deaths = going.deaths + 1 if rounds <= going.rounds else 1
        if deaths > MOST_DEATHS:
            if not run.finished:
                self.control.stop(run.run_id)
            self._give_up(run.run_id, TOO_OFTEN.format(deaths=deaths, rounds=rounds))
            return
        since = self.dead.setdefault(run.run_id, self.clock())
        if self.clock() < since + pause(deaths):
            return
        self.record.going_on[run.run_id] = Going(
            job=going.job, out=going.out, rounds=rounds, deaths=deaths, restarting=True
        )
        self.record.save(self.state)
        if not run.finished:
            self.control.stop(run.run_id)
        self._start_again(run.run_id)

    def _start_again(self, run_id: int) -> None:
        going = self.record.going_on[run_id]
        following = self._already_started(run_id, going.out)
        if following is None:
            try:
                following = self.control.start_job(going.job, going.out)
            except ConfigError as error:
                self._give_up(run_id, f"its process died, and it cannot be started again: {error}")
                return
        self.record.going_on[following] = going.model_copy(update={"restarting": False})
        self.record.continued[run_id] = following
        self._forget(run_id)
        self.tell(goes_on(run_id, following))

    def _already_started(self, run_id: int, out: str) -> int | None:
        """The run in the same run directory that was submitted after this one, if there is one."""
        for run in self.control.runs():
            if run.run_id == run_id:
                return None
            if self.control.config(run.run_id)[1] == out:
                return run.run_id
        return None

    def _give_up(self, run_id: int, reason: str) -> None:
        self.record.given_up[run_id] = reason
        self._forget(run_id)
        self.tell(f"run {run_id}: {reason}")

    def _forget(self, run_id: int) -> None:
        del self.record.going_on[run_id]
        self.dead.pop(run_id, None)
        self.lingering.pop(run_id, None)
        self.record.save(self.state)
        remove(process_file(self.state, run_id))


def goes_on(run_id: int, following: int) -> str:
    """The line about a run whose process died."""
    return f"the process of run {run_id} died; it goes on as run {following}"


def whole_rounds(out: str) -> int:
    """How many rounds the run directory has lines of."""
    try:
        return (Path(out) / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def pause(deaths: int) -> float:
    """Seconds between a death and the next start: none at first, then 1, 2, 4, …"""
    return 0.0 if deaths <= 1 else 2.0 ** (deaths - 2)


def became(state: Path, run: Run) -> Run | int | None:
    """What became of a run that has finished: its end, the id under which it goes on, None: not known yet.

    Raises:
        ConfigError: the record can't be read.
    """
    record = Record.load(state)
    if run.run_id in record.continued:
        return record.continued[run.run_id]
    if run.run_id in record.going_on and (run.died or record.going_on[run.run_id].restarting):
        return None
    if run.run_id in record.given_up:
        return replace(run, details=record.given_up[run.run_id])
    return run
