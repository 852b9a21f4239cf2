"""Which of a cohort's clients take part in a round, and how long the round lasts in simulated time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atoll.report.run_result import RoundExtras, RoundLine


@dataclass(frozen=True)
class CohortRequest:
    """A round's request to its cohort: `goal` updates are wanted; bytes are those to and from each client.

    `steps` is each client's number of local steps; None: what the job says.
    """

    round: int
    attempt: int
    cohort: Sequence[str]
    goal: int
    bytes_down: int
    bytes_up: int
    steps: int | None = None


@dataclass(frozen=True)
class Participation:
    """The clients whose updates count, and how many others were unavailable, late or not needed any more.

    `seconds` is the round's duration in simulated time; None where time is not simulated.
    """

    names: Sequence[str]
    seconds: float | None = None
    unavailable: int = 0
    late: int = 0
    surplus: int = 0

    def logged(self, elapsed: float) -> RoundExtras:
        """The entry for the round's log line; `elapsed` is the simulated seconds before the round."""
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
"""Simulates which clients answer a request; in a real federation the clients themselves decide."""


def always_available(call: CohortRequest) -> Participation:
    """The whole cohort takes part, and time is not simulated."""
    return Participation(call.cohort)


def elapsed(log: Sequence[RoundLine]) -> float:
    """Simulated seconds from the run's start to the end of the log's last round; 0 where time is real."""
    return float(log[-1]["simulated"]["elapsed"]) if log and "simulated" in log[-1] else 0.0
