"""The events of a run, which are passed to a callback for display."""

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
    """The participating clients are known, and the backbone is located."""

    roster: ClientRoster
    backbone: Backbone
    inputs_description: str = ""
    """How inputs are preprocessed for the backbone; may be empty."""


@dataclass(frozen=True)
class RunResumed(Event):
    """A run that was interrupted goes on after this round."""

    round: int


@dataclass(frozen=True)
class StageBegun(Event):
    """After this round other parts of the model are trained; `tuning` describes them."""

    round: int
    tuning: str


@dataclass(frozen=True)
class RoundEnded(Event):
    """A round is over; `line` is its line of `metrics.jsonl`."""

    line: RoundLine


@dataclass(frozen=True)
class BaselinesBegun(Event):
    """All rounds are over, and the training of the job's baselines begins."""


@dataclass(frozen=True)
class FinalEvaluationBegun(Event):
    """The evaluation of the final model, at the server and at clients, begins."""


EventCallback = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """Do nothing: the callback of runs that show nothing."""
