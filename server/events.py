"""The steps of a run, as they are told to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atoll.backbones.resolve import Backbone
    from atoll.report.run_result import RoundLine
    from atoll.server.roster import ClientRoster


@dataclass(frozen=True)
class Event:
    """Something that happened in a run; `EventCallback`s ignore kinds that they don't know."""


@dataclass(frozen=True)
class ClientsFound(Event):
    """The clients that take part are known, and the backbone is loaded."""

    roster: ClientRoster
    backbone: Backbone
    inputs_in_words: str = ""
    """What becomes of inputs before the backbone sees them."""


@dataclass(frozen=True)
class RunResumed(Event):
    """A run that was interrupted goes on after this round."""

    round: int


@dataclass(frozen=True)
class StageBegun(Event):
    """From the round after this one on other parts are tuned; `tuning` says which."""

    round: int
    tuning: str


@dataclass(frozen=True)
class RoundEnded(Event):
    """A round is over; `line` is what `metrics.jsonl` holds of it."""

    line: RoundLine


@dataclass(frozen=True)
class BaselinesBegun(Event):
    """All rounds are over, and what the job compares with is trained."""


@dataclass(frozen=True)
class FinalEvaluationBegun(Event):
    """The final model is measured everywhere."""


EventCallback = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """For runs that nobody watches."""
