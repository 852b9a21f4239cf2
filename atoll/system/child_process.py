"""Child processes: programs from the fork server, each a process group, none outliving its parent."""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

from atoll.system.fork_server import QUIET, start_program

logger = logging.getLogger(__name__)

__all__ = ["QUIET", "Child", "environment", "free_port"]


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of Flower's programs: quiet, offline, and with a FLWR_HOME of their own."""
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(home), **more}


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


_INFO = re.compile(r"(?<![A-Z])INFO\b")


class Child:
    """One program (`module:function` with arguments) that is started, watched and stopped.

    What it writes goes to the descriptors `streams` (output, errors), or else to the log at level DEBUG and,
    its end, to `tail`. `title` is what ps and its like show after the name. When its parent is killed it is
    asked to stop, or, if it `dies_with_parent`, killed too.
    """

    def __init__(
        self,
        name: str,
        entry: str,
        arguments: Sequence[str],
        env: Mapping[str, str],
        *,
        title: str = "",
        streams: tuple[int, int] | None = None,
        dies_with_parent: bool = False,
    ) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=60)
        self._entry, self._arguments, self._env = entry, tuple(arguments), dict(env)
        self._title, self._streams = f"atoll {name} {title}".strip(), streams
        self._dies_with_parent = dies_with_parent
        self._process: BaseProcess | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """How it ended: its exit status, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode if self._process else None

    def start(self) -> None:
        """Start the program."""
        self.tail.clear()
        if self._streams is not None:
            self._process = self._started(*self._streams)
            return
        reader, writer = os.pipe()
        try:
            self._process = self._started(writer, writer)
        finally:
            os.close(writer)
        output = os.fdopen(reader, encoding="utf-8", errors="replace")
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def _started(self, output: int, errors: int) -> BaseProcess:
        return start_program(
            self._entry, self._arguments, environment=self._env, output=output, errors=errors,
            title=self._title, dies_with_parent=self._dies_with_parent,
        )  # fmt: skip

    def _read(self, output: IO[str]) -> None:
        with output:
            for line in output:
                self.tail.append(line.rstrip())
                logger.debug("%s: %s", self.name, line.rstrip())

    def last_lines(self) -> str:
        """The output's end, once the program has ended."""
        if self._reader is not None:
            self._reader.join(timeout=2)
        return "\n".join(self.tail)

    def last_complaints(self) -> str:
        """The lines at the output's end that are more than the program's log of what it does."""
        return "\n".join(line for line in self.last_lines().splitlines() if not _INFO.search(line))

    def stop(self, grace: float = 8.0) -> None:
        """Ask the program and all that it started to end, wait, then end what is left."""
        if self._process is None or self._process.pid is None:
            return
        leader = self._process.pid
        _signal_group(leader, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (self.running or _group_lives(leader)):
            time.sleep(0.05)
        if self.running:
            logger.warning("%s does not stop; killing it", self.name)
        _signal_group(leader, signal.SIGKILL)
        self._process.join()


def _signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True
