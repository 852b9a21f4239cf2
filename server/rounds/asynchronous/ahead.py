"""Requests to clients that are not waited for: what comes meanwhile is kept until it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

from atoll.protocol.messages import Reply
from atoll.protocol.requests import Request

LOOK_SECONDS = 0.1
"""How long to sleep before looking again whether something has come."""


@runtime_checkable
class AsksAhead(Protocol):
    """A transport whose clients work while the server does something else."""

    def ask_ahead(self, request: Request, names: Sequence[str], timeout: float) -> Iterator[Reply | None]:
        """Replies of the named clients; None whenever no more has come yet, the end at the deadline."""
        ...


def _made(keep: Callable[[Reply], Reply], reply: Reply | None) -> Reply | None:
    return None if reply is None else keep(reply)


@dataclass
class Conversation:
    """One request under way: the clients that haven't replied to it yet, and their replies as they come."""

    waiting: set[str]
    replies: Iterator[Reply | None]

    def look(self) -> Iterator[tuple[str, Reply | None]]:
        """(client, what it sent) of those that are done by now; past the deadline all, some with nothing."""
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
    """Conversations under way, all looked at in turn by one thread, and what clients have sent in them.

    A client is done when it has replied, or when the deadline of its request has passed.
    """

    carrier: AsksAhead
    timeout: float
    under_way: list[Conversation] = field(default_factory=list)
    done: dict[str, Reply | None] = field(default_factory=dict)
    """What each client sent that is done, if anything, in the order in which they were."""

    def ask(
        self, request: Request, names: Sequence[str], keep: Callable[[Reply], Reply] = lambda reply: reply
    ) -> None:
        """Send a request and wait for nothing; of what comes back, what `keep` makes of it is kept."""
        come = self.carrier.ask_ahead(request, names, self.timeout)
        replies = map(partial(_made, keep), come)  # which holds no reply while the next is waited for
        self.under_way.append(Conversation(set(names), replies))
        self._look()

    @property
    def waiting(self) -> set[str]:
        """Who was asked and isn't done."""
        return set().union(*(conversation.waiting for conversation in self.under_way))

    def has_asked(self, client: str) -> bool:
        """Whether a client was asked for something that wasn't taken yet."""
        return client in self.done or client in self.waiting

    def first(self, count: int) -> list[str]:
        """The clients that were done first, so many or all that were asked, by name; waits for them."""
        while len(self.done) < count and self.waiting:
            self._wait()
        return sorted(list(self.done)[:count])

    def until(self, enough: Callable[[Collection[str]], bool]) -> None:
        """Look again and again, until what is asked of the clients that are done is true."""
        while not enough(self.done.keys()):
            self._wait()

    def take(self, clients: Sequence[str]) -> list[Reply]:
        """What those clients sent, and forget it; waits until they are done."""
        while self.waiting & set(clients):
            self._wait()
        sent = [self.done.pop(client) for client in clients]
        return [reply for reply in sent if reply is not None]

    def close(self) -> None:
        """Wait for nobody any more."""
        self.under_way.clear()

    def _wait(self) -> None:
        before = len(self.done)
        self._look()
        if len(self.done) == before:
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        """Take in what has come in every conversation."""
        for conversation in self.under_way:
            self.done.update(conversation.look())
        self.under_way = [conversation for conversation in self.under_way if conversation.waiting]
