"""Restarting runs whose process died: each goes on after its last complete round, under a new id.

A run's process holds a lock on a file of its own, so that its death is noticed at once, also by a server that
has been restarted itself. The state of each run is in the kit's `state/runs.json`, which only the server
writes; `submit`, `logs`, `stop` and `status` read from it under which id a run goes on.
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
"""How often a run is started again without completing a round in between; then it is given up."""
TOO_OFTEN = (
    "its process died {deaths} times after round {rounds}; once what kills it is mended, it goes on with"
    " atoll submit --resume"
)
LINGER_SECONDS = 20.0
"""How long a process may take to end by itself once its run has ended."""
KEPT = 200
"""How many runs that were restarted, and how many that were given up, stay in the record."""


class Control(Protocol):
    """The calls to Flower's SuperLink that supervision needs; `FlowerControlClient` implements them."""

    def run(self, run_id: int) -> Run:
        """The status of one run."""

    def runs(self, limit: int = 20) -> list[Run]:
        """The latest runs, newest first."""

    def config(self, run_id: int) -> tuple[str, str]:
        """(the job of a run as JSON, its run directory)."""

    def start_job(self, job: str, out: str) -> int:
        """Start a run; returns its id."""

    def stop(self, run_id: int) -> bool:
        """Stop a run; returns whether this call stopped it."""


class Going(BaseModel):
    """A run in progress: its job as JSON, and its run directory."""

    model_config = ConfigDict(extra="forbid")

    job: str
    out: str
    rounds: int = 0
    """The number of complete rounds when it was last started."""
    deaths: int = 0
    """How often its process has died in a row without completing a round."""
    restarting: bool = False
    """Whether the server is starting it again; after a crash of the server that may have happened already."""


class Record(BaseModel):
    """The runs in progress, and what happened to those whose process died, by run id."""

    model_config = ConfigDict(extra="forbid")

    going_on: dict[int, Going] = {}
    continued: dict[int, int] = {}
    """The id of the run that was started in the place of each."""
    given_up: dict[int, str] = {}
    """The reason why each isn't started again."""

    @classmethod
    def load(cls, state: Path) -> Record:
        """Read the record in a kit's state folder; an empty record if there is none.

        Raises:
            ConfigError: the file can't be read or is damaged.
        """
        path = state / RECORD
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None

    def save(self, state: Path) -> None:
        """Write the record and sync it to disk."""
        for table in (self.continued, self.given_up):
            for run_id in list(table)[:-KEPT]:
                del table[run_id]
        replace_synced(state / RECORD, self.model_dump_json(indent=1).encode())

    def latest(self, run_id: int) -> int:
        """The id of the last run that was started in this run's place; the run's own id if there is none."""
        while run_id in self.continued:
            run_id = self.continued[run_id]
        return run_id


def process_file(state: Path, run_id: int) -> Path:
    """The path of the file that a run's process holds locked for as long as it lives."""
    return state / "runs" / f"{run_id}.pid"


@dataclass
class RunSupervisor:
    """Starts runs again whose process died, until each ends with a result, an error of its own, or a stop."""

    state: Path
    control: Control
    tell: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    record: Record = field(init=False)
    dead: dict[int, float] = field(default_factory=dict)
    """The time at which each run's process was first found dead."""
    lingering: dict[int, float] = field(default_factory=dict)
    """For each process that outlives its run, the time at which that was first noticed."""

    def __post_init__(self) -> None:
        self.record = Record.load(self.state)

    def look(self, runs: Iterable[Run]) -> None:
        """Record the status of these runs, and start again those whose process died.

        Raises:
            JobError: the SuperLink doesn't answer; the next call continues where this one stopped.
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
        """Whether the process was found dead at an earlier call too, and the run hasn't ended since.

        One call isn't enough: a process reports its run's end just before it exits.
        """
        is_known = run_id in self.dead
        self.dead.setdefault(run_id, self.clock())
        return is_known

    def _end_process(self, run_id: int) -> None:
        """Kill a process whose run has ended, after a grace period: it still holds the run directory."""
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
        """The id of a run in the same run directory that was submitted after this one; None without one."""
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
    """The operator's line about a run whose process died and that was started again."""
    return f"the process of run {run_id} died; it goes on as run {following}"


def whole_rounds(out: str) -> int:
    """The number of complete rounds in a run directory, by the lines of its metrics.jsonl."""
    try:
        return (Path(out) / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def pause(deaths: int) -> float:
    """Seconds between a death and the next start: none at first, then 1, 2, 4, …"""
    return 0.0 if deaths <= 1 else 2.0 ** (deaths - 2)


def became(state: Path, run: Run) -> Run | int | None:
    """The final state of a finished run; or the id of the run that was started in its place.

    None as long as the server hasn't decided whether to start it again.

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
