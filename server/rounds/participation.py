"""Who of a cohort takes part in a round, and how long the round lasts by the devices' own clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atoll.report.run_result import RoundExtras, RoundLine


@dataclass(frozen=True)
class CohortRequest:
    """A round's call to its cohort: how many updates it wants, and how many bytes travel to and from each."""

    round: int
    attempt: int
    cohort: Sequence[str]
    goal: int
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class Participation:
    """Those whose updates count, and what became of the others.

    `seconds` is how long the round took by the simulated clock; None where time is not simulated.
    """

    names: Sequence[str]
    seconds: float | None = None
    unavailable: int = 0
    late: int = 0
    surplus: int = 0

    def logged(self, elapsed: float) -> RoundExtras:
        """For the round's line; `elapsed` is the simulated time before the round, in seconds."""
        if self.seconds is None:
            return {}
        return {
            "simulated": {
                "seconds": self.seconds,
                "elapsed": elapsed + self.seconds,
                "unavailable": self.unavailable,
                "late": self.late,
                "surplus": self.surplus,
            }
        }


AvailabilityModel = Callable[[CohortRequest], Participation]
"""Decides a call's turnout. A real federation's clients decide it themselves."""


def always_available(call: CohortRequest) -> Participation:
    """Time is not simulated: the whole cohort is asked."""
    return Participation(call.cohort)


def elapsed(log: Sequence[RoundLine]) -> float:
    """Simulated seconds until the end of the last round of a log."""
    return float(log[-1]["simulated"]["elapsed"]) if log and "simulated" in log[-1] else 0.0
