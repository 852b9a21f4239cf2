"""A federation of real processes on loopback: a server, its sites, and the command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from atoll.errors import JobError
from atoll.job.job import Job
from atoll.server.deploy.provision import provision
from atoll.server.deploy.status import status
from atoll.server.deploy.submit import submit
from atoll.server.run.directory import job_toml
from tests.support.processes import Started, wait_until
from tests.support.processes import atoll as start_atoll

ASKING = 0.2
"""Seconds between two questions to a server, each of which it has to answer by two calls of its own."""


@dataclass
class Running:
    """One verb of the command line as a process of its own, and what it wrote."""

    process: Started | subprocess.Popen[bytes]
    log: Path

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def says(self, words: str, times: int = 1) -> None:
        """Wait until it has said this, so often."""

        def has_written() -> bool:
            return self.text().count(words) >= times

        try:
            wait_until(has_written, words, alive=lambda: self.process.poll() is None or has_written())
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.text()}") from None

    def ends(self) -> int:
        """Its exit status, once it has ended by itself."""
        return self.process.wait()

    def end(self) -> int:
        """Its exit status, after SIGTERM."""
        self.process.terminate()
        return self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def atoll(log: Path, *arguments: str, **options: Any) -> Running:
    """Start a verb."""
    return Running(start_atoll(*arguments, log=log, **options), log)


def installed_atoll(log: Path, code: Path, *arguments: str) -> Running:
    """Start a verb of the code in a folder as a person does: with a new Python, which imports it."""
    with log.open("ab") as output:
        command = [sys.executable, "-m", "atoll", *arguments]
        env = os.environ | {"PYTHONPATH": str(code)}
        return Running(subprocess.Popen(command, stdout=output, stderr=output, cwd=code, env=env), log)


FIRST_PORT, PORTS = 20_000, 10_000
"""Below those that the system gives to connections, which take one here and there at any moment."""
_taken: list[FileLock] = []
"""Whoever holds a port's lock has it to itself among all tests on this machine, until its process ends."""


def unused_port() -> int:
    """A loopback port that nobody listens on, and that no other test is going to take."""
    folder = Path("/var/tmp", f"atoll-test-ports-{os.getuid()}")  # one for all, wherever their folders lie
    folder.mkdir(exist_ok=True)
    for port in range(FIRST_PORT, FIRST_PORT + PORTS):
        lock = FileLock(folder / str(port), thread_local=False)
        with contextlib.suppress(OSError, Timeout), socket.create_server(("127.0.0.1", port)):
            lock.acquire(blocking=False)
            _taken.append(lock)
            return port
    raise AssertionError(f"none of the ports from {FIRST_PORT} is unused")


def provisioned(
    folder: Path,
    names: Sequence[str],
    port: int,
    clients: Mapping[str, Sequence[str]] | None = None,
    *,
    host: str = "127.0.0.1",
) -> dict[str, Path]:
    """Kits by name; `clients` are those of sites that answer for others than one of their own name."""
    folder.mkdir(parents=True, exist_ok=True)
    hosted = {name: f"clients = {json.dumps(list(given))}\n" for name, given in (clients or {}).items()}
    sites = "".join(f'[[site]]\nname = "{name}"\n{hosted.get(name, "")}' for name in names)
    (folder / "sites.toml").write_text(f'[server]\nhost = "{host}"\nport = {port}\n{sites}')
    return {kit.name: kit for kit in provision(folder / "sites.toml", folder / "kits")}


@dataclass
class Federation:
    """Kits, and whatever was started with them."""

    folder: Path
    kits: dict[str, Path]
    serving: dict[str, Any] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    count: int = 0

    @property
    def server(self) -> Path:
        return self.kits["server"]

    def start(self, name: str, *arguments: str, **options: Any) -> Running:
        self.running[name] = atoll(self._log(name), *arguments, **options)
        return self.running[name]

    def _log(self, name: str) -> Path:
        self.count += 1
        return self.folder / f"{self.count:03d}-{name}.log"

    def serve(self) -> Running:
        running = self.start("server", "serve", str(self.server), **self.serving)
        running.says("ready on")
        return running

    def join(self, site: str, *data: Path, kit: Path | None = None, **options: Any) -> Running:
        paths = [word for path in data for word in ("--data", str(path))]
        return self.start(site, "join", str(kit or self.kits[site]), *paths, **options)

    def join_with(self, code: Path, site: str, data: Path) -> Running:
        """Join with the code in a folder instead of this one."""
        arguments = ("join", str(self.kits[site]), "--data", str(data))
        self.running[site] = installed_atoll(self._log(site), code, *arguments)
        return self.running[site]

    def online(self) -> set[str]:
        try:
            return set(status(self.server).online)
        except JobError:
            return set()

    def wait_online(self, *sites: str) -> None:
        """Until these sites are connected."""
        wait_until(lambda: set(sites) <= self.online(), f"connection of {sites}", pause=ASKING)

    def wait_alone(self) -> None:
        """Until no site is connected."""
        wait_until(lambda: not self.online(), f"leaving of {self.online()}", pause=ASKING)

    def run(self, job: Job, show: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """Submit a job, wait for its end; its result."""
        self.count += 1
        out = self.folder / f"run-{self.count:03d}"
        try:
            submit(job.canonical, self.server, out=out, show=show)
        except JobError as error:
            said = "\n".join(f"{name}: {one.text()[-900:]}" for name, one in self.running.items())
            raise AssertionError(f"{error}; they said:\n{said}") from error
        return result_of(out)

    def submit(self, job: Job, out: Path, *words: str, **options: Any) -> Running:
        """Submit in a process of its own."""
        file = out.with_suffix(".toml")
        file.write_text(job_toml(job))
        arguments = ("submit", str(file), "--server", str(self.server), "--out", str(out), *words)
        return self.start("submit", *arguments, **options)

    def latest(self) -> int:
        """The id of the latest run."""
        return status(self.server).runs[0].run_id

    def pid_of(self, program: str) -> int:
        """The process of the server that runs one of Flower's programs."""
        control = json.loads((self.server / "state" / "serve.json").read_text())["control"]
        for pid, line in command_lines():
            if program in line and (str(self.server) in line or control in line):
                return pid
        raise AssertionError(f"no {program}")

    def processes(self) -> list[str]:
        """The command line of every process that was started with one of these kits."""
        return [line for _, line in command_lines() if str(self.folder) in line]

    def close(self) -> None:
        """End what is still running, the server last."""
        for name, running in reversed(list(self.running.items())):
            if name != "server":
                running.process.send_signal(signal.SIGCONT)
                running.end()
        if "server" in self.running:
            self.running["server"].end()


@contextmanager
def federation_of(
    folder: Path, *names: str, clients: Mapping[str, Sequence[str]] | None = None, **serving: Any
) -> Iterator[Federation]:
    """A server for these sites, for the time of the block; `serving` says how its process is started."""
    made = Federation(folder, provisioned(folder, names, unused_port(), clients), serving)
    try:
        made.serve()
        yield made
    finally:
        made.close()


def result_of(out: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


def rounds_of(out: Path) -> list[dict[str, Any]]:
    """The rounds that a run has written so far."""
    metrics = out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines]


def command_lines() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        yield int(path.parent.name), line
