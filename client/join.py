"""A site: Flower's SuperNode as a supervised child, and the resident process that does the work."""

import email.utils
import http.client
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from client.executor import Executor, Pace
from protocol.child import Child, environment, free_port
from protocol.code import installed_hashes
from protocol.errors import DataError, JobError
from protocol.kit import SiteKit
from protocol.lock import only_one
from protocol.signals import Interrupted, stop_on_signals

logger = logging.getLogger(__name__)

SUPERNODE = "client.executor:supernode"
CONNECTED = "SuperNode ID: "
"""What the SuperNode writes once the server has let it in."""
CONNECT_SECONDS = 10.0
SHORTEST_PAUSE = 1.0
LONGEST_PAUSE = 10.0
REFUSED_SECONDS = 240.0
"""A vanished connection of the same site is forgotten by the server after a minute; then it's the key."""
CLOCK_SECONDS = 120.0
"""Flower refuses signatures that are 300 s old or more."""
FORWARD_SECONDS = 0.5
"""Enough for the SuperNode to send the last reply on."""


def join(
    kit: Path,
    data: Sequence[Path],
    *,
    tell: Callable[[str], None] = logger.info,
    stop: threading.Event | None = None,
) -> None:
    """Take part in the kit's federation until SIGTERM, SIGINT or `stop`.

    One path is the site's own shard; of several, each is a client named as its folder.

    A server that isn't up, or is restarted, is waited for. Raises JobError where waiting can't help:
    the server's certificate is another authority's, or it refuses this site's key for minutes.
    """
    loaded = SiteKit.load(kit)
    for path in data:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    stop = stop or threading.Event()
    with ExitStack() as stack:
        stack.enter_context(only_one(loaded.state / "join.lock", "a site"))
        site = _Site(loaded, [path.resolve() for path in data], tell, stop)
        stack.callback(site.close)
        stack.enter_context(stop_on_signals(stop, working=lambda: site.working))
        site.stay()
    tell("stopped")


@dataclass
class _Site:
    """The SuperNode of a site and the executor that answers for it."""

    kit: SiteKit
    data: list[Path]
    tell: Callable[[str], None]
    stop: threading.Event
    working: bool = False
    connected: bool = False
    pause: float = SHORTEST_PAUSE
    refused_since: float | None = None
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        # Imported here because it brings in torch, which the command line should not wait for.
        from client.app import app

        address = f"127.0.0.1:{free_port()}"
        self.supernode = Child(
            "supernode", SUPERNODE, self._arguments(address), environment(self.kit.state / "flwr")
        )
        self.executor = Executor(
            address=address,
            secret=self.kit.secret.read_bytes(),
            app=app,
            hashes=installed_hashes(),
            stop=self.stop,
            node_config={
                "name": self.kit.name,
                "data-paths": json.dumps([str(p) for p in self.data]),
                "ledgers": str(self.kit.ledgers),
                "memory": str(self.kit.memory),
                "budget": self.kit.budget.model_dump_json() if self.kit.budget else "",
            },
        )

    def _arguments(self, address: str) -> list[str]:
        host, _, port = address.rpartition(":")
        return [
            *("--superlink", str(self.kit.address), "--root-certificates", str(self.kit.authority)),
            *("--auth-supernode-private-key", str(self.kit.key)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self.kit.secret)),
            *("--host", host, "--port", port),
        ]

    def stay(self) -> None:
        """Answer tasks as they come, and see to it that the SuperNode runs, until we are to stop."""
        while not self.stop.is_set():
            if not self.supernode.running:
                self._connect()
            elif token := self.executor.acquire():
                self._work(token)
            else:
                self._tell_connected()
                self.stop.wait(self.pace.seconds)

    def _tell_connected(self) -> None:
        if not self.connected and any(CONNECTED in line for line in list(self.supernode.tail)):
            self.connected = True
            self.tell(f"{self.kit.name} is connected to the server at {self.kit.address}")

    def _work(self, token: str) -> None:
        self.working = True
        try:
            self.executor.run(token)
        except Interrupted:
            time.sleep(FORWARD_SECONDS)
        finally:
            self.working = False
        self.pace.worked()

    def _connect(self) -> None:
        """Start the SuperNode once the server answers; say what is in the way if it doesn't."""
        if self.supernode.pid is not None:
            self._explain_end()
            self.supernode.stop()
            self._wait()
        while not self.stop.is_set():
            obstacle = self._obstacle()
            if obstacle is None:
                self.supernode.start()
                return
            self.tell(f"waiting for the server at {self.kit.address}: {obstacle}")
            self._wait()

    def _wait(self) -> None:
        self.stop.wait(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)

    def _obstacle(self) -> str | None:
        """Why the server can't be reached just now, or None; raises where waiting can't help."""
        try:
            skew = server_clock_skew(self.kit)
        except ssl.SSLCertVerificationError as error:
            raise JobError(
                f"the server at {self.kit.address} is not the one of this kit: {error.verify_message}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__
        if abs(skew) > CLOCK_SECONDS:
            return f"this machine's clock is {skew:+.0f} s off the server's"
        return None

    def _explain_end(self) -> None:
        words = self.supernode.last_words()
        logger.debug("last words of the supernode:\n%s", words)
        self.connected = False
        if CONNECTED in words:
            self.refused_since, self.pause = None, SHORTEST_PAUSE
        if "Exit Code: 305" not in words:
            self.tell("the connection to the server ended; connecting again")
            return
        self.refused_since = self.refused_since or time.monotonic()
        if time.monotonic() - self.refused_since > REFUSED_SECONDS:
            raise JobError(f"the server at {self.kit.address} does not know the key of site {self.kit.name}")
        said = re.search(r"connection to the SuperLink\.\n(.*)", words)
        self.tell(
            f"refused by the server ({said.group(1) if said else 'no reason given'}): this site's last "
            "connection has not timed out yet (up to a minute), it is connected from elsewhere, "
            "or the server does not know its key"
        )

    def close(self) -> None:
        self.supernode.stop()


def server_clock_skew(kit: SiteKit) -> float:
    """Seconds by which this clock is ahead of the server's, asked over TLS under the kit's authority."""
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
