"""The one scheduler: a virtual clock, what is to happen when, and a trace of what has."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

MOST_SECONDS = 100_000.0
"""Of virtual time, after which a federation hangs."""


class Hangs(BaseException):
    """The run neither ends nor says why; a BaseException, so that nothing in between takes it for its own."""


@dataclass
class Scheduler:
    """Stands in for the module `time`: who sleeps lets all happen that is due until then."""

    seed: int
    now: float = 1000.0
    trace: list[str] = field(default_factory=list)
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _draws: int = 0

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        """Let time pass, and happen what is due."""
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            moment, _, act = heapq.heappop(self._due)
            self.now = max(self.now, moment)
            act()
        self.now = max(self.now, until)
        if self.now > MOST_SECONDS:
            raise Hangs(f"still at work after {MOST_SECONDS:.0f} s")

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Have something happen then."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), act))

    def draw(self) -> float:
        """A number from 0 to 1 of the seed's sequence."""
        self._draws += 1
        mixed = (self.seed + self._draws * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return float((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self.now:9.2f} {text}")
