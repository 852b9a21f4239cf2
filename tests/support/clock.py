"""A clock that tests turn: who sleeps by it wakes at once, and that much later."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TurnedClock:
    """Stands in for the module `time`."""

    now: float = 1000.0

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Turn the clock on."""
        self.now += seconds
