"""What strangers can take up of the public port: connections that say nothing, or too many of them.

A connection has ten seconds to shake hands and send the head of its first request, whatever it trickles,
and half a minute between requests. One address holds so many connections at most, and all addresses from
which no site has been heard yet hold half of the file descriptors, so that the other half is left to sites.
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
"""From the connection's begin to the end of its first request's head."""
IDLE_SECONDS = 30.0
"""From the end of an answer to the end of the next request's head."""
AN_ADDRESS = 64
"""Connections that a stranger's address may hold; several sites may share one."""
RESERVED = 64
"""Descriptors for everything else: files, the SuperLink, the executor."""
LOOK_SECONDS = 0.5
SAY_AGAIN_SECONDS = 60.0

Key = tuple[str, int]
"""A peer's address and port."""


def descriptors() -> int:
    """How many files this process may have open, after it has asked for as many as it can get."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return min(most, 2**20) if most != resource.RLIM_INFINITY else 2**20


@dataclass
class ConnectionLimits:
    """The open connections, and which of them may stay; all of it happens in the proxy's thread."""

    tell: Callable[[str], None] = logger.warning
    clock: Callable[[], float] = time.monotonic
    most: int = field(default_factory=lambda: max(descriptors() - RESERVED, 2))
    an_address: int = AN_ADDRESS
    open: dict[Key, Connection] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    known: set[str] = field(default_factory=set)
    """Addresses from which a site has been heard."""
    last_warned: dict[str, float] = field(default_factory=dict)

    def admits(self, address: str) -> bool:
        """Whether one more connection from there may be opened; if not, that is told, once a minute."""
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
        """A connection has been let in."""
        connection.until = self.clock() + HEAD_SECONDS
        self.open[connection.key] = connection
        self.held[connection.key[0]] += 1

    def closed(self, connection: Connection) -> None:
        """It is gone."""
        if self.open.get(connection.key) is connection:
            del self.open[connection.key]
            address = connection.key[0]
            self.held[address] -= 1
            if not self.held[address]:
                del self.held[address]

    def asks(self, key: Key) -> None:
        """The head of a request has come: it is waited for and answered by limits of its own."""
        if key in self.open:
            self.open[key].until = None

    def answered(self, key: Key, *, by_a_site: bool) -> None:
        """A request has been answered; `by_a_site`: it was a site's, by its key."""
        if by_a_site:
            self.known.add(key[0])
        if key in self.open:
            self.open[key].until = self.clock() + IDLE_SECONDS

    async def watch(self) -> None:
        """Close connections that have said nothing for too long, until this is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = self.clock()
            for connection in list(self.open.values()):
                if connection.until is not None and now >= connection.until:
                    connection.hang_up()


class Connection(socket.socket):
    """A peer's connection that says when it is closed."""

    key: Key
    limits: ConnectionLimits
    until: float | None = None
    """When it is closed unless a request's head has come; None while one is answered."""

    def hang_up(self) -> None:
        """Make both ends see that it is over; whoever reads from it closes it then."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            self.limits.closed(self)  # it is gone already

    def close(self) -> None:
        """Close it, and make room for another one."""
        self.limits.closed(self)
        super().close()


class LimitedListener(socket.socket):
    """A listening socket that lets in what the limits admit, and closes anything else at once."""

    limits: ConnectionLimits

    @classmethod
    def of(cls, listener: socket.socket, limits: ConnectionLimits) -> LimitedListener:
        """The listener, taken over."""
        limited = cls(fileno=listener.detach())
        limited.limits = limits
        return limited

    def accept(self) -> tuple[Connection, tuple[str, int]]:
        """The next connection that is let in.

        Raises:
            BlockingIOError: there is none just now.
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
