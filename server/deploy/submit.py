"""Start a job on a live federation, follow its log, and stop it."""

import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.errors import ConfigError, JobError
from atoll.job.job import Job
from atoll.kit.kit import ServerKit
from atoll.server.audit_log import ServerAuditLog
from atoll.server.deploy.flower_control import FlowerControlClient, Unreachable
from atoll.server.deploy.serve import runtime_path
from atoll.server.deploy.status import Run, lock_path, no_server
from atoll.server.deploy.supervision import Record, became, goes_on
from atoll.system.lock import is_held

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
"""How long following a run waits for a server that doesn't answer."""


def submit(
    job_json: str,
    kit: Path,
    *,
    out: Path,
    show: Callable[[str], None] = logger.info,
    tell: Callable[[str], None] = logger.info,
    started: Callable[[int], None] = lambda run_id: None,
) -> int:
    """Run a job, given as JSON, on the federation and wait for its end; returns the id under which it ended.

    `show` gets the run's log line by line, `started` the run's id once it is known. A KeyboardInterrupt
    leaves the run going; `tell` then gets the commands that follow and stop it.

    Raises:
        ConfigError: no server runs on the kit, or the job is invalid.
        JobError: the run failed or was stopped.
    """
    with _control(kit, tell) as control:
        audit = ServerAuditLog.open(ServerKit.load(kit).state, Job.from_json(job_json))
        run_id = control.start_job(job_json, str(out.resolve()))
    audit.submitted(run_id, out.resolve())
    started(run_id)
    try:
        run = follow(kit, run_id, show=show, tell=tell)
    except KeyboardInterrupt:
        tell(f"run {run_id} goes on")
        server = shlex.join([str(run_id), "--server", str(kit)])
        tell(f"follow it with: atoll logs {server}")
        tell(f"stop it with:   atoll stop {server}")
        raise
    if not run.completed:
        raise JobError(f"run {run.run_id} {run.outcome}: {run.details or 'no reason given'}")
    return run.run_id


def follow(
    kit: Path,
    run_id: int,
    *,
    show: Callable[[str], None],
    tell: Callable[[str], None] = logger.info,
) -> Run:
    """Wait until a run has finished, and return it; `show` gets the run's log line by line.

    If the server doesn't answer, as during a restart, it is waited for, up to two minutes. If the run's
    process dies, the run that the server starts in its place is followed, and `tell` gets its id.
    """
    after, seen = 0.0, time.monotonic()
    while True:
        try:
            with _control(kit) as control:
                for part in control.log(run_id, after):
                    after, seen = part.until, time.monotonic()
                    _show_lines(part.text, show)
                run = control.run(run_id)
            end = became(ServerKit.load(kit).state, run) if run.finished else None
            if isinstance(end, Run):
                return end
            if end is not None:
                tell(goes_on(run_id, end))
                run_id, after = end, 0.0
            seen = time.monotonic()
        except (Unreachable, ConfigError):
            if time.monotonic() - seen > PATIENCE_SECONDS:
                raise
        time.sleep(1)


def _show_lines(text: str, show: Callable[[str], None]) -> None:
    for line in text.splitlines():
        show(line)


def logs(
    kit: Path, run_id: int, *, show: Callable[[str], None], tell: Callable[[str], None] = logger.info
) -> Run:
    """Pass a run's log to `show`, from its beginning to the run's end; returns the finished run."""
    with _control(kit) as control:
        control.run(run_id)
    return follow(kit, run_id, show=show, tell=tell)


def stop(kit: Path, run_id: int) -> Run:
    """Stop a run, or the run that was started in its place; returns that run's status after the call."""
    state, end = ServerKit.load(kit).state, time.monotonic() + PATIENCE_SECONDS
    with _control(kit) as control:
        control.run(run_id)  # an unknown one is refused
        while True:
            latest = control.run(Record.load(state).latest(run_id))
            is_between = latest.finished and not isinstance(became(state, latest), Run)
            if not is_between or time.monotonic() > end:
                break
            time.sleep(0.2)  # its process died, and the server is about to start it again
        if not latest.finished:
            control.stop(latest.run_id)
        return control.run(latest.run_id)


@contextmanager
def _control(kit: Path, tell: Callable[[str], None] = logger.info) -> Iterator[FlowerControlClient]:
    """Within, a client of the Control API of the server that runs on the kit."""
    control = FlowerControlClient(control_address(kit, tell), ServerKit.load(kit))
    try:
        yield control
    finally:
        control.close()


def control_address(kit: Path, tell: Callable[[str], None] = logger.info) -> str:
    """The address of the Control API of the server on the kit; waits for a server that is starting.

    Raises:
        ConfigError: no server runs on the kit, or it ended before it was ready.
    """
    loaded, has_told = ServerKit.load(kit), False
    while True:
        try:
            return str(json.loads(runtime_path(loaded).read_text(encoding="utf-8"))["control"])
        except (FileNotFoundError, json.JSONDecodeError):  # not there, or being written
            if not is_held(lock_path(loaded)):
                raise no_server(kit) from None
        if not has_told:
            tell(f"the server on {kit} is starting; waiting for it")
            has_told = True
        time.sleep(0.2)
