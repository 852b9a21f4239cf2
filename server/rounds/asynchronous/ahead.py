"""Requests that the server doesn't wait for: replies are stored as they arrive, until a round takes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

from atoll.protocol.messages import Reply
from atoll.protocol.requests import Request

LOOK_SECONDS = 0.1
"""The pause between two checks for new replies."""


@runtime_checkable
class AsksAhead(Protocol):
    """A transport that can send a request without waiting for the replies."""

    def ask_ahead(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply | None]:
        """The named clients' replies as they arrive, and None whenever nothing new has arrived yet.

        The iterator ends when all have replied, or `timeout` seconds after the request.
        """
        ...


def _mapped(keep: Callable[[Reply], Reply], reply: Reply | None) -> Reply | None:
    return None if reply is None else keep(reply)


@dataclass
class Conversation:
    """One request in progress: the clients that haven't replied yet, and the iterator over their replies."""

    waiting: set[str]
    replies: Iterator[Reply | None]

    def look(self) -> Iterator[tuple[str, Reply | None]]:
        """(client, reply) for each client that has finished since the last call.

        Past the request's deadline, every client that hasn't replied is returned with None.
        """
        for reply in self.replies:
            if reply is None:
                return
            if reply.client in self.waiting:
                self.waiting.discard(reply.client)
                yield reply.client, reply
        for client in sorted(self.waiting):
            self.waiting.discard(client)
            yield client, None


@dataclass
class AskedAhead:
    """All requests in progress and the replies that have arrived; one thread polls the requests in turn.

    A client is done when it has replied, or when the deadline of its request has passed.
    """

    carrier: AsksAhead
    timeout: float
    under_way: list[Conversation] = field(default_factory=list)
    done: dict[str, Reply | None] = field(default_factory=dict)
    """The reply of each client that is done, None if it sent none, in the order in which they finished."""

    def ask(
        self, request: Request, names: Sequence[str], keep: Callable[[Reply], Reply] = lambda reply: reply
    ) -> None:
        """Send a request to the named clients without waiting; `keep(reply)` is stored for each reply."""
        arriving = self.carrier.ask_ahead(request, names, self.timeout)
        replies = map(partial(_mapped, keep), arriving)  # keeps no reference to a reply it has passed on
        self.under_way.append(Conversation(set(names), replies))
        self._look()

    @property
    def waiting(self) -> set[str]:
        """The clients that were asked and aren't done."""
        return set().union(*(conversation.waiting for conversation in self.under_way))

    def has_asked(self, client: str) -> bool:
        """Whether a client has a request whose reply hasn't been taken yet."""
        return client in self.done or client in self.waiting

    def first(self, count: int) -> list[str]:
        """The `count` clients that finished first, sorted by name; waits for them.

        Fewer, where fewer were asked.
        """
        while len(self.done) < count and self.waiting:
            self._wait()
        return sorted(list(self.done)[:count])

    def until(self, enough: Callable[[Collection[str]], bool]) -> None:
        """Wait until `enough(names)` is true of the names of the clients that are done."""
        while not enough(self.done.keys()):
            self._wait()

    def take(self, clients: Sequence[str]) -> list[Reply]:
        """Remove and return the replies of these clients, once all of them are done."""
        while self.waiting & set(clients):
            self._wait()
        sent = [self.done.pop(client) for client in clients]
        return [reply for reply in sent if reply is not None]

    def close(self) -> None:
        """Drop all requests in progress."""
        self.under_way.clear()

    def _wait(self) -> None:
        before = len(self.done)
        self._look()
        if len(self.done) == before:
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        """Store what has arrived for every request."""
        for conversation in self.under_way:
            self.done.update(conversation.look())
        self.under_way = [conversation for conversation in self.under_way if conversation.waiting]
