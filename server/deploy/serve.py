"""A federation's server: Flower's SuperLink on loopback, its executor, and the public reverse proxy."""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from atoll.errors import ConfigError, DataError, JobError
from atoll.kit.credentials import check_server
from atoll.kit.kit import ServerKit
from atoll.server.deploy.connection_limits import SAY_AGAIN_SECONDS, ConnectionLimits
from atoll.server.deploy.flower_control import FlowerControlClient, Unreachable
from atoll.server.deploy.health import Health, address_from, answered
from atoll.server.deploy.heard import LastHeard, key_of_file
from atoll.server.deploy.reverse_proxy import ReverseProxy, listen
from atoll.server.deploy.status import Federation, Run, answering, lock_path
from atoll.server.deploy.superlink import TOKEN_FILE, new_token, token_path
from atoll.server.deploy.supervision import RunSupervisor
from atoll.system.audit_file import AuditFile
from atoll.system.child_process import Child, environment, free_port
from atoll.system.fork_server import import_first
from atoll.system.lock import only_one
from atoll.system.signals import stop_on_signals
from atoll.tasks.imports import ANY

logger = logging.getLogger(__name__)

START_SECONDS = 90.0
WATCH_SECONDS = 1.0
IDLE_LOOKS = 2
"""A server without a run asks the SuperLink for its sites and runs at every second look: answers are dear."""
LONGEST_PAUSE = 30.0
DAY_SECONDS = 86_400.0


def serve(
    kit: Path,
    *,
    health_address: str | None = None,
    tell: Callable[[str], None] = logger.info,
    stop: threading.Event | None = None,
) -> None:
    """Serve the federation until SIGTERM, SIGINT or `stop`; `tell` gets every line for the operator.

    gRPC health probes are answered on `health_address` (HOST:PORT), by default on a free port of loopback.

    The SuperLink and its executor are restarted when they die. Runs and registered sites are stored in a
    database in the kit, so a run goes on after a restart of the SuperLink.

    Raises:
        ConfigError: the kit is invalid, another server runs on it, or a port can't be listened on.
        JobError: the SuperLink doesn't start.
    """
    loaded = ServerKit.load(kit)
    for remark in check_server(loaded):
        tell(remark)
    wanted = address_from(health_address) if health_address else None
    stop = stop or threading.Event()
    with ExitStack() as stack:
        stack.enter_context(only_one(lock_path(loaded), "a server"))
        listener = stack.enter_context(listen(loaded.address))
        health = Health()
        where = stack.enter_context(answered(health, wanted))
        tell(f"health is answered on {where} (gRPC)")
        stack.enter_context(stop_on_signals(stop))
        server = _Server(loaded, free_port(), tell, stop, health, where)
        stack.callback(server.close)
        server.open()
        limits = ConnectionLimits(tell)
        gate = ReverseProxy(loaded, listener, server.superlink_address, limits, server.last_heard, tell)
        stack.callback(gate.stop)
        gate.start()
        stack.enter_context(_runtime_file(loaded, server.superlink_address, where))
        stack.enter_context(answering(loaded.state, server.status))
        if os.geteuid() == 0:
            tell("this server runs as root, and so does every run: a user of its own is safer")
        tell(f"ready on {loaded.address}; waiting for {', '.join(loaded.sites)}")
        server.watch()
        health.stop()
    tell("stopped")


@contextmanager
def _runtime_file(kit: ServerKit, control: str, health: str) -> Iterator[None]:
    """Within, a file in the kit holds the addresses of the Control API and of health probes."""
    path = runtime_path(kit)
    path.write_text(json.dumps({"control": control, "health": health}), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _last_written(kit: ServerKit) -> tuple[float, ...]:
    paths = (kit.folder / "kit.toml", kit.folder / "nodes")
    return tuple(path.stat().st_mtime_ns for path in paths if path.exists())


def _keys_of(kit: ServerKit) -> dict[str, bytes]:
    return {site: key_of_file(kit.node_key(site)) for site in kit.sites}


def runtime_path(kit: ServerKit) -> Path:
    return kit.state / "serve.json"


@dataclass
class _Server:
    """A server's two Flower processes, its supervision of runs, and the sites that are connected."""

    kit: ServerKit
    port: int
    tell: Callable[[str], None]
    stop: threading.Event
    health: Health
    health_address: str
    online: set[str] = field(default_factory=set)
    answered: bool = False
    """Whether the SuperLink answered at the last look."""
    pause: float = 1.0
    written: tuple[float, ...] = ()
    """The modification times of the kit's table and of the folder of the sites' keys."""
    last_heard: LastHeard = field(default_factory=LastHeard)
    keys: dict[str, bytes] = field(default_factory=dict)
    """Each site's public key."""
    silent: set[str] = field(default_factory=set)
    refused: dict[tuple[str, str], float] = field(default_factory=dict)
    """By site and address, the time of the last line about a refused connection from there."""
    clock: Callable[[], float] = time.monotonic
    looked_at_certificates: float = field(init=False)

    def __post_init__(self) -> None:
        self.written, self.keys = _last_written(self.kit), _keys_of(self.kit)
        self.looked_at_certificates = self.clock()
        new_token(self.kit)
        env = environment(
            self.kit.state / "flwr",
            FLWR_SUPEREXEC_TASK_POLL_INTERVAL="1",
            **{TOKEN_FILE: str(token_path(self.kit))},
        )
        title = f"{self.kit.folder} {self.superlink_address}"
        import_first(*PROGRAMS, *SERVER_APP)
        self.superlink = Child("superlink", SUPERLINK, self._superlink_arguments(), env, title=title)
        self.superexec = Child("superexec", SUPEREXEC, self._superexec_arguments(), env, title=title)
        self.control = FlowerControlClient(self.superlink_address, self.kit)
        self.supervisor = RunSupervisor(self.kit.state, self.control, self.tell)

    @property
    def superlink_address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _superlink_arguments(self) -> list[str]:
        kit = self.kit
        return [
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(kit.authority)),
            *("--ssl-certfile", str(kit.certificate), "--ssl-keyfile", str(kit.key)),
            *("--database", str(kit.state / "superlink.db")),
            *("--isolation", "process", "--superexec-auth-secret-file", str(kit.secret)),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]

    def _superexec_arguments(self) -> list[str]:
        return [
            *("--runtime-api-address", self.superlink_address),
            *("--root-certificates", str(self.kit.authority)),
            *("--superexec-auth-secret-file", str(self.kit.secret)),
        ]

    def open(self) -> None:
        self.superlink.start()
        self._wait_for_superlink()
        self.control.admit({site: self.kit.node_key(site) for site in self.kit.sites})
        self.superexec.start()
        self._look_around()

    def _wait_for_superlink(self) -> None:
        """Return once the SuperLink answers or the server is to stop; raises JobError if it doesn't start."""
        deadline = time.monotonic() + START_SECONDS
        while not self.stop.wait(0.1):
            try:
                self.control.nodes()
                return
            except Unreachable:
                if not self.superlink.running or time.monotonic() > deadline:
                    raise JobError(f"the SuperLink did not start:\n{self.superlink.last_lines()}") from None

    def watch(self) -> None:
        """Restart processes that end, and report sites that come and go, until the server is to stop."""
        looks = 0
        while not self.stop.wait(WATCH_SECONDS):
            looks += 1
            for child in (self.superlink, self.superexec):
                if not child.running:
                    self._restart(child)
            self._follow_kit()
            if self.health.going_on or not self.answered or looks % IDLE_LOOKS == 0:
                self._look_around()
            else:
                self._tell_silent()
            self._look_at_certificates()

    def _look_at_certificates(self) -> None:
        """Report, once a day, certificates that expire soon or have expired: a server may run for years."""
        if self.clock() - self.looked_at_certificates < DAY_SECONDS:
            return
        self.looked_at_certificates = self.clock()
        try:
            remarks = check_server(self.kit)
        except ConfigError as error:
            remarks = [str(error)]
        for remark in remarks:
            self.tell(remark)

    def _follow_kit(self) -> None:
        """Admit exactly the sites that are now in the kit, which provisioning may have changed."""
        written = _last_written(self.kit)
        if written == self.written:
            return
        self.written = written
        try:
            changed = ServerKit.load(self.kit.folder)
            self.keys = _keys_of(changed)
            self.control.admit({site: changed.node_key(site) for site in changed.sites})
        except (ConfigError, OSError, ValueError) as error:
            self.tell(
                f"the kit has changed and cannot be used, its sites stay: {' '.join(str(error).split())}"
            )
            return
        except JobError:
            self.written = ()  # the SuperLink doesn't answer just now: the next look tries again
            return
        came, left = set(changed.sites) - set(self.kit.sites), set(self.kit.sites) - set(changed.sites)
        self.kit = replace(self.kit, sites=changed.sites)
        for name in sorted(came):
            self.tell(f"{name} may join now")
        for name in sorted(left):
            self.tell(f"{name} is let in no longer")

    def _restart(self, child: Child) -> None:
        self.health.not_serving(f"the {child.name} ended; it is started again")
        self.tell(f"the {child.name} ended; starting it again")
        if complaints := child.last_complaints():
            logger.warning("last words of the %s:\n%s", child.name, complaints)
        child.stop(grace=0)
        self.stop.wait(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        if not self.stop.is_set():
            child.start()

    def _look_around(self) -> None:
        try:
            online = {node.name for node in self.control.nodes() if node.online}
            self._look_at_runs()
        except JobError as error:
            self.answered = False
            self.health.not_serving(str(error))
            return
        self.answered = True
        if self.superlink.running and self.superexec.running:
            self.health.serving()
        self.pause = 1.0
        for name in sorted(self.online - online):
            self.online.remove(name)
            self.tell(f"{name} is gone ({len(self.online)} of {len(self.kit.sites)})")
        for name in sorted(online - self.online):
            self.online.add(name)
            self.tell(f"{name} is connected ({len(self.online)} of {len(self.kit.sites)})")
        self._tell_silent()
        self._tell_refused()

    def _tell_silent(self) -> None:
        """Report sites that have become silent, or are heard again, while Flower counts them as online."""
        silent = self.last_heard.silent(self.keys, self.online)
        for name in sorted(silent.keys() - self.silent):
            self.tell(f"{name} is silent: nothing was heard of it for {silent[name]:.0f} s")
        for name in sorted((self.silent - silent.keys()) & self.online):
            self.tell(f"{name} is heard again")
        self.silent = set(silent)

    def _tell_refused(self) -> None:
        """Report refused connections of sites that are connected already, once a minute for each address."""
        sites = {key: site for site, key in self.keys.items()}
        for key, address in self.last_heard.take_refused():
            site, now = sites.get(key, ""), self.clock()
            if not site or now < self.refused.get((site, address), -math.inf) + SAY_AGAIN_SECONDS:
                continue
            self.refused[site, address] = now
            self.tell(
                f"{site} asked from {address} to connect while it is connected: refused; it was cut off less"
                " than a minute ago, or its kit is used twice"
            )
            fields = {"asked": "connection", "decision": "refused", "site": site, "from": address}
            try:
                AuditFile.open(self.kit.state).write(fields)
            except (DataError, OSError) as error:
                self.tell(f"not in the server's log: {error}")

    def _look_at_runs(self) -> None:
        """Update the health of runs, and start runs again whose process died.

        Only the latest run and those in progress are requested, because Flower cleans up after every finished
        run each time it lists it.
        """
        latest = self.control.runs(limit=1)
        if latest and not self.health.knows(latest[0].run_id):
            latest = self.control.runs()
        others = self.health.going_on - {run.run_id for run in latest}
        runs = [*latest, *(self.control.run(run_id) for run_id in others)]
        self.health.update(runs)
        if self.superexec.running:
            self.supervisor.look(runs)

    def status(self) -> Federation:
        """The federation's present status; may be called from any thread."""
        control = FlowerControlClient(self.superlink_address, self.kit)
        try:
            nodes, runs = control.nodes(), tuple(control.runs())
            self.health.update(runs)
        except JobError as error:
            self.health.not_serving(str(error))
            return Federation((), (), (), frozenset(), str(error), self.health_address, known=False)
        finally:
            control.close()
        online = tuple(sorted(node.name for node in nodes if node.online))
        return Federation(
            online=online,
            offline=tuple(sorted(node.name for node in nodes if not node.online)),
            runs=tuple(map(self._with_next_run, runs)),
            going_on=self.health.going_on,
            trouble=self.health.trouble,
            health=self.health_address,
            silent=self.last_heard.silent(self.keys, online),
        )

    def _with_next_run(self, run: Run) -> Run:
        """The run; if its process died and it was started again, with the new run's id in its details."""
        following = self.supervisor.record.continued.get(run.run_id)
        return run if following is None else replace(run, details=f"goes on as run {following}")

    def close(self) -> None:
        """Stop both processes, the executor first, so that a ServerApp can still report how it ended."""
        self.superexec.stop()
        self.superlink.stop(grace=3)
        self.control.close()


SUPERLINK = "atoll.server.deploy.superlink:superlink"
SUPEREXEC = "atoll.server.deploy.executor:superexec"
PROGRAMS = ("flwr.superlink.cli.flower_superlink", "flwr.superlink.main", "atoll.server.deploy.executor")
SERVER_APP = ("atoll.server.app", *ANY)
"""The modules that the fork server imports before it forks the two Flower processes and runs' processes."""
