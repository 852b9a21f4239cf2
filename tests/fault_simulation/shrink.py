"""Make a failing scenario short: drop faults for as long as it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.fault_simulation.faults import Scenario
from tests.fault_simulation.play import Outcome

Play = Callable[[Scenario], Outcome]


def shrunk(scenario: Scenario, play: Play) -> Outcome:
    """The outcome of the shortest scenario found in which an invariant fails that failed before.

    Raises:
        ValueError: nothing fails.
    """
    outcome = play(scenario)
    if not outcome.violations:
        raise ValueError(f"seed {scenario.seed}: nothing fails")
    wanted = _names(outcome)
    found = True
    while found:
        found = False
        for shorter in _shorter(outcome.scenario):
            tried = play(shorter)
            if wanted & _names(tried):
                outcome, found = tried, True
                break
    return outcome


def _names(outcome: Outcome) -> set[str]:
    """The invariants that were violated."""
    return {line.partition(":")[0] for line in outcome.violations}


def _shorter(scenario: Scenario) -> list[Scenario]:
    without = [scenario.without(place) for place in range(len(scenario.faults))]
    return [*without, *([replace(scenario, again=False)] if scenario.again else [])]
