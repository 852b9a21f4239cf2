"""When each node is sent its message again, until it answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

RESEND_SECONDS = 60.0
"""A message without an answer is sent again after this time, then after twice as long, and so on.

A site answers the same request with the same reply and does not train twice.
"""
RESEND_PART = 0.25
"""The fraction of the round's timeout after which it is sent again, if that is sooner."""
HELLO_AGAIN_SECONDS = 5.0
"""When a request for greetings is sent again, which is cheap; `federation.wait` bounds the whole wait."""


class ResendSchedule:
    """The time at which each node that hasn't answered is sent its message next."""

    def __init__(
        self, nodes: Iterable[int], kind: str, timeout: float, now: float, most: float = RESEND_SECONDS
    ) -> None:
        soon = HELLO_AGAIN_SECONDS if kind == "query" else timeout * RESEND_PART
        self._first_pause = min(most, soon)
        self._due = dict.fromkeys(nodes, now)
        self._pauses: dict[int, float] = {}

    def __contains__(self, node: int) -> bool:
        return node in self._due

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._due))

    def __len__(self) -> int:
        return len(self._due)

    def late(self, now: float) -> list[int]:
        """The nodes whose time has come; the next comes for each after a pause that doubles."""
        found = [node for node, moment in self._due.items() if now >= moment]
        for node in found:
            pause = self._pauses.get(node, self._first_pause)
            self._due[node], self._pauses[node] = now + pause, 2 * pause
        return found

    def is_lost(self, node: int, at: float = math.inf) -> None:
        """The message, or its answer, is known to be lost: send it `at` that time, and count pauses anew.

        A pause grows while nobody knows whether the site still works on its answer. Had it grown by messages
        that are known to be lost, the next loss would be noticed too late.
        """
        self._due[node] = at
        self._pauses.pop(node, None)

    def answered(self, node: int) -> None:
        """Nothing is to be sent to it any more."""
        del self._due[node]
