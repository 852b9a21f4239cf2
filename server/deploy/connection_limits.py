"""Limits on connections to the public port, so that idle or excessive ones can't shut the sites out.

A connection has ten seconds for the TLS handshake and the head of its first request, however slowly data
arrives, and half a minute between requests. An address from which no site has been heard yet may hold at most
`AN_ADDRESS` connections, and all such addresses together half of the file descriptors; the rest is left to
sites.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
"""The time limit from the opening of a connection to the end of its first request's head."""
IDLE_SECONDS = 30.0
"""The time limit from the end of an answer to the end of the next request's head."""
AN_ADDRESS = 64
"""Connections that an unknown address may hold; several sites may share an address."""
RESERVED = 64
"""File descriptors reserved for everything but connections: files, the SuperLink, the executor."""
LOOK_SECONDS = 0.5
SAY_AGAIN_SECONDS = 60.0

Key = tuple[str, int]
"""A peer's address and port."""


def descriptors() -> int:
    """Raise this process's limit of open files to its maximum; returns the new limit, at most 2^20."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return min(most, 2**20) if most != resource.RLIM_INFINITY else 2**20


@dataclass
class ConnectionLimits:
    """The open connections and the rules for admitting and closing them; used in the proxy's thread only."""

    tell: Callable[[str], None] = logger.warning
    clock: Callable[[], float] = time.monotonic
    most: int = field(default_factory=lambda: max(descriptors() - RESERVED, 2))
    an_address: int = AN_ADDRESS
    open: dict[Key, Connection] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    known: set[str] = field(default_factory=set)
    """Addresses from which a site has been heard."""
    last_warned: dict[str, float] = field(default_factory=dict)
    """The time of the last warning about each subject: an address, or a limit on all of them."""

    def admits(self, address: str) -> bool:
        """Whether one more connection from this address may be opened; a refusal is logged once a minute."""
        if len(self.open) >= self.most:
            self._say(
                "all", f"{len(self.open)} connections are open, as many as there may be: no more is let in"
            )
            return False
        if address in self.known:
            return True
        if self.held[address] >= self.an_address:
            self._say(
                address, f"{address} holds {self.held[address]} connections: no more is let in from there"
            )
            return False
        strangers = sum(held for one, held in self.held.items() if one not in self.known)
        if strangers >= self.most // 2:
            self._say(
                "strangers", f"addresses of no known site hold {strangers} connections: no more is let in"
            )
            return False
        return True

    def _say(self, about: str, line: str) -> None:
        now = self.clock()
        if now - self.last_warned.get(about, -SAY_AGAIN_SECONDS) >= SAY_AGAIN_SECONDS:
            self.last_warned = {
                one: at for one, at in self.last_warned.items() if now - at < SAY_AGAIN_SECONDS
            }
            self.last_warned[about] = now
            self.tell(line)

    def opened(self, connection: Connection) -> None:
        """Record an admitted connection."""
        connection.until = self.clock() + HEAD_SECONDS
        self.open[connection.key] = connection
        self.held[connection.key[0]] += 1

    def closed(self, connection: Connection) -> None:
        """Remove a connection; one that isn't recorded is ignored."""
        if self.open.get(connection.key) is connection:
            del self.open[connection.key]
            address = connection.key[0]
            self.held[address] -= 1
            if not self.held[address]:
                del self.held[address]

    def asks(self, key: Key) -> None:
        """Suspend the time limit: a request's head has arrived, and the proxy limits the rest itself."""
        if key in self.open:
            self.open[key].until = None

    def answered(self, key: Key, *, by_a_site: bool) -> None:
        """Restart the time limit after an answer; `by_a_site`: the request was signed with a site's key."""
        if by_a_site:
            self.known.add(key[0])
        if key in self.open:
            self.open[key].until = self.clock() + IDLE_SECONDS

    async def watch(self) -> None:
        """Close connections that have exceeded their time limit, until this is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = self.clock()
            for connection in list(self.open.values()):
                if connection.until is not None and now >= connection.until:
                    connection.hang_up()


class Connection(socket.socket):
    """A socket that reports its closing to the connection limits."""

    key: Key
    limits: ConnectionLimits
    until: float | None = None
    """The time at which it is closed if no request's head has arrived; None while one is answered."""

    def hang_up(self) -> None:
        """Shut the connection down in both directions; the server's reader then closes the socket."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.limits.closed(self)  # it is gone already

    def close(self) -> None:
        """Close the socket and remove it from the open connections."""
        self.limits.closed(self)
        super().close()


class LimitedListener(socket.socket):
    """A listening socket that accepts only connections that the limits admit, and closes others at once."""

    limits: ConnectionLimits

    @classmethod
    def of(cls, listener: socket.socket, limits: ConnectionLimits) -> LimitedListener:
        """A limited listener on the same socket; `listener` must not be used any more."""
        limited = cls(fileno=listener.detach())
        limited.limits = limits
        return limited

    def accept(self) -> tuple[Connection, tuple[str, int]]:
        """The next admitted connection and its peer's address.

        Raises:
            BlockingIOError: no connection is waiting.
        """
        while True:
            plain, peer = super().accept()
            key = (str(peer[0]), int(peer[1]))
            if not self.limits.admits(key[0]):
                plain.close()
                continue
            connection = Connection(fileno=plain.detach())
            connection.key, connection.limits = key, self.limits
            self.limits.opened(connection)
            return connection, peer
