"""A running site: supervises Flower's SuperNode and the resident process that does the work."""

import email.utils
import http.client
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from atoll.client.policy import POLICY, Policy
from atoll.errors import DataError, JobError
from atoll.kit.credentials import check_site
from atoll.kit.kit import SiteKit
from atoll.kit.roster import SiteIdentity
from atoll.system.child_process import Child, free_port
from atoll.system.child_process import environment as flower_environment
from atoll.system.fork_server import import_first
from atoll.system.lock import only_one
from atoll.system.signals import stop_on_signals
from atoll.tasks.imports import ANY

logger = logging.getLogger(__name__)

SUPERNODE = "atoll.client.deploy.executor:supernode"
EXECUTOR = "atoll.client.deploy.executor:answer_tasks"
PROGRAMS = ("atoll.client.deploy.executor", "atoll.client.app")
"""The modules that the fork server imports for both processes."""
WATCH_SECONDS = 0.2
LAST_STEP_SECONDS = 30.0
"""How long the executor may take to finish its present training step when it is to stop."""
CONNECTED = "SuperNode ID: "
"""What the SuperNode logs once the server has accepted it."""
RECEIVED = "Receiving: "
FORWARDED = ("Sent successfully", "Ignoring reply message", "Failed to send message")
"""What the SuperNode logs about a message that it has received, and about the reply, one at a time."""
FORWARD_SECONDS = 10.0
"""How long the SuperNode may take to forward the last reply to the server."""
CONNECT_SECONDS = 10.0
SHORTEST_PAUSE = 1.0
LONGEST_PAUSE = 10.0
REFUSED_SECONDS = 240.0
"""After this time of refusals the site gives up: the server doesn't know its key.

Until a minute after it broke, the site's previous connection may be the reason instead.
"""
UNTIMELY = (9, 10)
"""OpenSSL's codes for a certificate that isn't valid yet or has expired: the server may get a new one."""
CLOCK_SECONDS = 120.0
"""The largest accepted difference of the two clocks; Flower refuses signatures that are 300 s old."""


def join(
    kit: Path,
    data: Sequence[Path],
    *,
    tell: Callable[[str], None] = logger.info,
    stop: threading.Event | None = None,
    executor: Sequence[str] = (EXECUTOR,),
) -> None:
    """Take part in the kit's federation until SIGTERM, SIGINT or `stop`.

    A single path in `data` is the site's own shard; of several paths, each is the shard of a client named as
    its folder. `tell` gets every line for the operator. `executor` is the entry point (`module:function`) of
    the process that answers the server's tasks, followed by further arguments in its sys.argv.

    If the server isn't running or is restarted, the site waits for it.

    Raises:
        ConfigError: the kit, its roster or its policy is invalid.
        DataError: one of the paths doesn't exist.
        JobError: waiting can't help: the server's certificate is not from this kit's authority, or the server
            has refused this site's key for minutes.
    """
    loaded = SiteKit.load(kit)
    for remark in check_site(loaded):
        tell(remark)
    SiteIdentity.load(loaded.folder)
    if Policy.load(loaded.folder) is not None:
        tell(f"this site's own rules are those of {loaded.folder / POLICY}")
    for path in data:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    stop = stop or threading.Event()
    with ExitStack() as stack:
        stack.enter_context(only_one(loaded.state / "join.lock", "a site"))
        site = _Site(loaded, [path.resolve() for path in data], tell, stop, executor)
        stack.callback(site.close)
        stack.enter_context(stop_on_signals(stop))
        site.stay()
    tell("stopped")


@dataclass
class _Site:
    """A site's two processes: the SuperNode, and the executor that answers its tasks."""

    kit: SiteKit
    data: list[Path]
    tell: Callable[[str], None]
    stop: threading.Event
    entry: Sequence[str] = (EXECUTOR,)
    connected: bool = False
    pause: float = SHORTEST_PAUSE
    refused_since: float | None = None
    last_obstacle: str = ""
    """The obstacle that was reported last; empty once the site is connected."""

    def __post_init__(self) -> None:
        address = f"127.0.0.1:{free_port()}"
        environment = flower_environment(self.kit.state / "flwr")
        import_first(*PROGRAMS, *ANY)
        self.supernode = Child(
            "supernode", SUPERNODE, self._arguments(address), environment, title=str(self.kit.folder)
        )
        work = {
            "address": address,
            "secret": str(self.kit.secret),
            "node_config": {
                "name": self.kit.name,
                "kit": str(self.kit.folder),
                "data-paths": json.dumps([str(p) for p in self.data]),
                "ledgers": str(self.kit.ledgers),
                "memory": str(self.kit.memory),
                "budget": self.kit.budget.model_dump_json() if self.kit.budget else "",
            },
        }
        self.executor = Child(
            "executor", self.entry[0], [json.dumps(work), *self.entry[1:]], os.environ,
            title=str(self.kit.folder),
            streams=(1, 2), dies_with_parent=True,
        )  # fmt: skip

    def _arguments(self, address: str) -> list[str]:
        host, _, port = address.rpartition(":")
        return [
            *("--superlink", str(self.kit.address), "--root-certificates", str(self.kit.authority)),
            *("--auth-supernode-private-key", str(self.kit.key)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self.kit.secret)),
            *("--host", host, "--port", port),
        ]

    def stay(self) -> None:
        """Keep both processes running until `stop` is set."""
        while not self.stop.is_set():
            if self.supernode.running and self.executor.running:
                self._tell_connected()
                self.stop.wait(WATCH_SECONDS)
            else:
                self._connect()

    def _tell_connected(self) -> None:
        if not self.connected and any(CONNECTED in line for line in list(self.supernode.tail)):
            self.connected, self.last_obstacle = True, ""
            self.tell(f"{self.kit.name} is connected to the server at {self.kit.address}")

    def _connect(self) -> None:
        """Start both processes once the server answers; report the obstacle while it doesn't."""
        if self.supernode.pid is not None:
            self._explain_end()
            self.close()
            self._wait()
        while not self.stop.is_set():
            obstacle = self._obstacle()
            if obstacle is None:
                self.supernode.start()
                self.executor.start()
                return
            self._tell_change(f"waiting for the server at {self.kit.address}: {obstacle}")
            self._wait()

    def _tell_change(self, obstacle: str) -> None:
        """Report an obstacle, unless it is the one that was reported last."""
        if obstacle != self.last_obstacle:
            self.tell(obstacle)
        self.last_obstacle = obstacle

    def _wait(self) -> None:
        self.stop.wait(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def _obstacle(self) -> str | None:
        """Why the server can't be reached at the moment; None if it can.

        Raises:
            JobError: waiting can't help.
        """
        try:
            skew = server_clock_skew(self.kit)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code in UNTIMELY:
                return (
                    f"{error.verify_message}; its operator makes another by atoll provision --renew, or one"
                    " of the two clocks is wrong"
                )
            raise JobError(
                f"the server at {self.kit.address} is not the one of this kit: {error.verify_message}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        if abs(skew) > CLOCK_SECONDS:
            return f"this machine's clock is {skew:+.0f} s off the server's"
        return None

    def _explain_end(self) -> None:
        """Report which process ended, and why if that is known.

        Raises:
            JobError: waiting can't help.
        """
        if not self.executor.running:
            how = self.executor.exit_code
            self.connected = False
            self.tell(f"the process that trains ended ({_ending(how)}); connecting again with another")
            return
        last_lines = self.supernode.last_lines()
        logger.debug("last words of the supernode:\n%s", last_lines)
        self.connected = False
        if CONNECTED in last_lines:
            self.refused_since, self.pause = None, SHORTEST_PAUSE
        if "Exit Code: 305" not in last_lines:
            self.tell("the connection to the server ended; connecting again")
            return
        self.refused_since = self.refused_since or time.monotonic()
        if time.monotonic() - self.refused_since > REFUSED_SECONDS:
            raise JobError(f"the server at {self.kit.address} does not know the key of site {self.kit.name}")
        match = re.search(r"connection to the SuperLink\.\n(.*)", last_lines)
        self._tell_change(
            f"refused by the server ({match.group(1) if match else 'no reason given'}): this site's last "
            "connection has not timed out yet (up to a minute), it is connected from elsewhere, "
            "or the server does not know its key"
        )

    def close(self) -> None:
        """Stop both processes, the executor first, because the SuperNode must forward its last reply."""
        answers = self.executor.running
        self.executor.stop(grace=LAST_STEP_SECONDS)
        deadline = time.monotonic() + FORWARD_SECONDS
        while answers and self.supernode.running and has_reply_to_forward(list(self.supernode.tail)):
            if time.monotonic() > deadline:
                logger.warning("the last reply did not reach the server within %.0f s", FORWARD_SECONDS)
                break
            time.sleep(WATCH_SECONDS)
        self.supernode.stop()


def has_reply_to_forward(lines: Sequence[str]) -> bool:
    """Whether a SuperNode with these log lines has received a message whose reply isn't forwarded yet."""
    for line in reversed(lines):
        if any(text in line for text in FORWARDED):
            return False
        if RECEIVED in line:
            return True
    return False


def _ending(code: int | None) -> str:
    """A description of how a process ended, from its exit code.

    >>> _ending(-9), _ending(1)
    ('killed by signal 9; out of memory?', 'exit status 1')
    """
    if code is not None and code < 0:
        return f"killed by signal {-code}{'; out of memory?' if code == -9 else ''}"
    return f"exit status {code}"


def server_clock_skew(kit: SiteKit) -> float:
    """Seconds by which this machine's clock is ahead of the server's, which is asked over TLS.

    Raises:
        ssl.SSLCertVerificationError: the server's certificate isn't valid under the kit's authority.
        OSError, http.client.HTTPException: the server doesn't answer.
    """
    context = ssl.create_default_context(cafile=str(kit.authority))
    connection = http.client.HTTPSConnection(
        kit.address.host, kit.address.port, timeout=CONNECT_SECONDS, context=context
    )
    try:
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date", "")
    finally:
        connection.close()
    there = email.utils.parsedate_to_datetime(date) if date else datetime.now(UTC)
    return (datetime.now(UTC) - there).total_seconds()
