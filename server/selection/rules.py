"""The rule that samples a job's cohorts, and how its state is stored in checkpoints."""

from __future__ import annotations

from atoll.errors import ConfigError
from atoll.job.federation import OortSection
from atoll.job.job import Job
from atoll.server.roster import ClientRoster
from atoll.server.rounds.cohort import round_up
from atoll.server.rounds.run_state import SelectionRule
from atoll.server.selection.by_size import BySize
from atoll.server.selection.oort import Oort
from atoll.server.selection.power_of_choice import PowerOfChoice
from atoll.strategies.strategy import State

PREFIX = "selection."
"""Prefix of a rule's state in checkpoints."""


def selection_rule(job: Job, roster: ClientRoster) -> SelectionRule | None:
    """The job's rule for sampling the roster's clients; None where all clients are equally likely.

    Raises:
        ConfigError: no client reports how many examples it has, or the job gives speeds of unknown clients.
    """
    federation, names, sizes = job.federation, roster.names, roster.sizes
    if federation.selection == "uniform":
        return None
    assert federation.cohort is not None
    if not sizes.any():
        raise ConfigError(
            f"federation.selection: {federation.selection!r} needs how many examples each client has, and"
            " none says it; expected 'uniform'"
        )
    invited = round_up(federation.cohort * federation.over_sampling)
    match federation.selection:
        case "by-size":
            return BySize(names, sizes, federation.cohort, job.seed)
        case "power-of-choice":
            candidates = max(invited, federation.candidates or 2 * federation.cohort)
            chosen = federation.weights is not None
            return PowerOfChoice(names, sizes, candidates, invited, job.seed, weights_are_chosen=chosen)
        case "oort":
            options = federation.oort or OortSection()
            _check_speeds(options, roster)
            return Oort(names, sizes, invited, job.train, job.seed, options)


def _check_speeds(options: OortSection, roster: ClientRoster) -> None:
    known = {*roster.names, *roster.refused} if options.speeds else set()
    strange = sorted((options.speeds or {}).keys() - known)
    if strange:
        raise ConfigError(
            f"federation.oort.speeds: there is no client {strange[0]!r}; expected names of the run's clients"
        )


def selection_to_checkpoint(state: State) -> State:
    """A rule's state with the names that it has in a checkpoint."""
    return {PREFIX + name: value for name, value in state.items()}


def selection_from_checkpoint(saved: State) -> tuple[State, State]:
    """(the rule's state, all other entries) of a checkpoint's state."""
    selection = {name.removeprefix(PREFIX): value for name, value in saved.items() if name.startswith(PREFIX)}
    return selection, {name: value for name, value in saved.items() if not name.startswith(PREFIX)}
