"""Child processes: Flower's programs, each in a session of its own, none outliving its parent."""

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

ORPHAN_POLL_SECONDS = 0.5
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from protocol.child import run; run()"


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


class Child:
    """One program (`module:function` with arguments) that is started, watched and stopped."""

    def __init__(self, name: str, entry: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=60)
        self._command = [sys.executable, "-c", _START, json.dumps(sys.path), entry, *arguments]
        self._env = dict(env)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the program; its output goes to the log at level DEBUG and, in part, to `tail`."""
        self.tail.clear()
        self._process = subprocess.Popen(
            self._command,
            env={**self._env, "ATOLL_PARENT": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self.tail.append(line.rstrip())
            logger.debug("%s: %s", self.name, line.rstrip())

    def last_words(self) -> str:
        """The output's end, once the program has ended."""
        if self._reader is not None:
            self._reader.join(timeout=2)
        return "\n".join(self.tail)

    def stop(self, grace: float = 8.0) -> None:
        """Ask the program and all that it started to end, wait, then end what is left."""
        if self._process is None:
            return
        _signal_session(self._process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (self.running or _session_lives(self._process.pid)):
            time.sleep(0.05)
        if self.running:
            logger.warning("%s does not stop; killing it", self.name)
        _signal_session(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _signal_session(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


def _session_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def run() -> None:
    """In the child: follow the parent into death, and call the entry with the arguments."""
    threading.Thread(target=_follow, args=(int(os.environ.pop("ATOLL_PARENT")),), daemon=True).start()
    module, _, function = sys.argv.pop(1).partition(":")
    getattr(importlib.import_module(module), function)()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(8)
    os.killpg(os.getpgid(0), signal.SIGKILL)
