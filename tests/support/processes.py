"""Processes that tests start, forked from one warm parent: the imports of torch and its like are paid once.

A process differs from one that is started for real in that alone; the few tests whose point is the start
itself use `subprocess`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import IO, Any

from atoll.system import fork_server
from atoll.system.fork_server import import_first, start_program
from atoll.tasks.imports import ANY

WATCHDOG_SECONDS = 600.0
"""What nothing takes, however busy the machine is: only a hang ends a wait."""

NOWHERE = os.devnull

import_first(
    "atoll.cli.main", "atoll.cli.site", "atoll.report.page",
    "atoll.sim.engines.engine", "atoll.sim.population.write_shards", "atoll.sim.search.trials",
    "atoll.server.app", "atoll.server.deploy.executor", "atoll.server.deploy.serve",
    "atoll.server.deploy.submit",
    "atoll.client.app", "atoll.client.deploy.executor", "atoll.client.deploy.join",
    "flwr.superlink.cli.flower_superlink", "flwr.superlink.main", "flwr.superlink.cli.flwr_serverapp",
    "flwr.supernode.main", "anyio._backends._asyncio", "uvicorn.protocols.http.httptools_impl",
    "opacus.grad_sample", *ANY,
)  # fmt: skip


@dataclass
class Started:
    """A process that a test has started, with what `subprocess.Popen` offers."""

    process: Any
    stdout: IO[str] | None = None
    stderr: IO[str] | None = None
    _said: dict[str, str] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        found: int = self.process.pid
        return found

    @property
    def returncode(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = WATCHDOG_SECONDS) -> int:
        """Its exit status, or minus the signal that ended it."""
        self.process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(str(self.process), timeout)
        return self.returncode

    def communicate(self, timeout: float = WATCHDOG_SECONDS) -> tuple[str, str]:
        """All that it writes until it ends: (output, errors)."""
        pipes = {name: pipe for name in ("stdout", "stderr") if (pipe := getattr(self, name)) is not None}
        readers = [threading.Thread(target=self._drain, args=item, daemon=True) for item in pipes.items()]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return self._said.get("stdout", ""), self._said.get("stderr", "")

    def _drain(self, name: str, pipe: IO[str]) -> None:
        with pipe:
            self._said[name] = pipe.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def atoll(*arguments: object, main: str = "atoll.cli.start:main", **options: Any) -> Started:
    """A verb of the command line in a process of its own, through the command's real entry point.

    Another `main` (`module:function`) may change something before it calls that.
    """
    return start({"main": main, "arguments": [str(a) for a in arguments]}, "atoll", **options)


def python(source: str, *arguments: object, **options: Any) -> Started:
    """A Python program, given as text, in a process of its own; its arguments are `sys.argv[1:]`."""
    return start({"source": source, "arguments": [str(a) for a in arguments]}, "python", **options)


def start(
    work: Mapping[str, Any],
    title: str,
    *,
    log: Path | None = None,
    output: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Started:
    """What `work` says, with output and errors in pipes, or both appended to `log`; no input.

    The process has this one's environment with `env` added, and dies when this one does.
    """
    given = json.dumps({**work, "cwd": str(cwd or Path.cwd())})
    if log is not None or not output:
        place = os.open(log or NOWHERE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        pipes, ends, streams = (None, None), [place], (place, place)
    else:
        (out, one), (err, two) = os.pipe(), os.pipe()
        pipes, ends, streams = (
            [os.fdopen(out, errors="replace"), os.fdopen(err, errors="replace")],
            [one, two],
            (one, two),
        )
    try:
        process = start_program(
            "tests.support.processes:run", (given,), environment={**os.environ, **(env or {})},
            output=streams[0], errors=streams[1], title=" ".join([title, *work["arguments"]]),
            dies_with_parent=True,
        )  # fmt: skip
    finally:
        for number in ends:
            os.close(number)
    return Started(process, pipes[0], pipes[1])


def run() -> None:
    """In the new process: a verb, or a program given as text."""
    work = json.loads(sys.argv[1])
    os.chdir(work["cwd"])
    if "source" in work:
        sys.argv = ["-c", *work["arguments"]]
        exec(compile(work["source"], "<program>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = ["atoll", *work["arguments"]]
    module, _, function = work["main"].partition(":")
    getattr(importlib.import_module(module), function)()


def wait_until(
    condition: Callable[[], object],
    what: str,
    alive: Callable[[], bool] = lambda: True,
    *,
    pause: float = 0.01,
) -> None:
    """Return once the condition holds; a hang, or the end of what was to be `alive`, fails the test.

    A condition that costs others something is looked at after longer pauses, in seconds.
    """
    for _ in watched(what, pause):
        if condition():
            return
        assert alive(), f"it ended before {what}"


def watched(what: str, pause: float = 0.01) -> Iterator[None]:
    """Look again and again, until the watchdog ends it."""
    end = time.monotonic() + WATCHDOG_SECONDS
    while time.monotonic() < end:
        yield
        time.sleep(pause)
    raise AssertionError(f"still no {what} after {WATCHDOG_SECONDS:.0f} s")


if __name__ == "__main__":  # writes the compiled files that all processes would otherwise make at once
    for module in fork_server._modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
