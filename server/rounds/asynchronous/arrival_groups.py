"""The number of local steps of each client, chosen so that clients of different speeds finish together.

COMPASS, the scheduler of FedCompass (Li et al. 2024, "FedCompass: Efficient Cross-Silo Federated Learning on
Heterogeneous Client Devices Using a Computing Power-Aware Scheduler"), in its symbols:

    S_i            seconds per local step of client i; after each task 0.1 S_i + 0.9 (time / steps)
    T_a, T_max     the time at which group a is expected, and the latest time until which it is waited for:
                   now + Q S_i and now + lambda Q S_i, for the client that opens the group with Q steps
    Q_min, Q_max   bounds of every client's steps: `min_steps`, `max_steps`; lambda is `latest_factor`

A client that starts joins the group in which it can take the most steps, among the groups with

    Q_min <= floor((T_a - now) / S_i) <= Q_max

If there is no such group, it opens one. For each open group a whose fastest client is j, the new group would
be done together with j's next task if the client took

    floor((T_max + Q_max S_j - now) / S_i)

steps. Q is the largest of these numbers that is at most Q_max, and at least Q_min; it is Q_max if all of them
are larger or no group is open. A client whose speed isn't known yet takes Q_min steps and is in no group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from atoll.strategies.options import FedCompassOptions
from atoll.strategies.strategy import State

if TYPE_CHECKING:
    from atoll.server.rounds.asynchronous.flights import Flight

SPEED, EXPECTED, LATEST = "flights.speed.", "flights.expected.", "flights.latest."
"""Prefixes of names in a checkpoint: each client's seconds per step, and the two times of each group."""

NEWEST = 0.9
"""The last task's weight in a client's speed, as in the authors' code."""
SHORTEST = 1e-12
"""The lower bound of a step's duration in seconds, so that speeds are never 0."""

AtWork = Mapping[str, "Flight"]
"""Clients at work, by name."""


@dataclass(frozen=True)
class Group:
    """The time at which a group is expected to be done, and the latest time until which it is waited for."""

    expected: float
    latest: float


@dataclass
class ArrivalGroups:
    """The clients' speeds in seconds per local step, and the groups of clients at work, numbered from 1."""

    speeds: dict[str, float] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)

    def in_order(self, clients: Sequence[str]) -> list[str]:
        """The clients in the order in which they start: the fastest first, those of unknown speed last."""
        return sorted(clients, key=lambda client: (self.speeds.get(client, math.inf), client))

    def assigned(
        self, client: str, now: float, at_work: AtWork, options: FedCompassOptions
    ) -> tuple[int, int, Group | None]:
        """(the client's local steps, the number of its group, the group); 0 and None where it is in no group.

        Nothing is changed: call `open` with the last two if the client really starts.
        """
        speed = self.speeds.get(client)
        if speed is None:
            return options.min_steps, 0, None
        fits = [(_steps(group.expected - now, speed), number) for number, group in self.groups.items()]
        fits = [one for one in fits if options.min_steps <= one[0] <= options.max_steps]
        if fits:
            steps, number = max(fits)
            return steps, number, self.groups[number]
        steps = self._steps_of_new_group(now, speed, at_work, options)
        opened = Group(now + steps * speed, now + options.latest_factor * steps * speed)
        return steps, 1 + max(self.groups, default=0), opened

    def _steps_of_new_group(
        self, now: float, speed: float, at_work: AtWork, options: FedCompassOptions
    ) -> int:
        steps_by_group = []
        for number, group in self.groups.items():
            if now < group.latest:
                fastest = min(
                    self._speed_by(now, client, flight)
                    for client, flight in at_work.items()
                    if flight.group == number
                )
                steps_by_group.append(_steps(group.latest + options.max_steps * fastest - now, speed))
        few_enough = [steps for steps in steps_by_group if steps <= options.max_steps]
        return max(options.min_steps, *few_enough) if few_enough else options.max_steps

    def open(self, number: int, group: Group | None) -> None:
        """Store the group of a client that has started; None: it is in no group."""
        if group is not None:
            self.groups[number] = group

    def next_merge(self, at_work: AtWork) -> tuple[list[str], float]:
        """(the clients that are merged next, sorted; the time of the merge); ([], inf) if none is at work.

        A group is merged when all its members are done, or at its latest time with the members done by then.
        A client that finishes later, or is in no group, is merged alone when it is done.
        """
        merges = [
            (flight.lands, [client]) for client, flight in at_work.items() if not self._is_in_time(flight)
        ]
        for number, group in self.groups.items():
            members = sorted(client for client, flight in at_work.items() if flight.group == number)
            in_time = [client for client in members if self._is_in_time(at_work[client])]
            if in_time:
                last = max(at_work[client].lands for client in in_time)
                merges.append((last if in_time == members else group.latest, in_time))
        nobody: tuple[float, list[str]] = (math.inf, [])
        end, clients = min(merges, default=nobody)
        return clients, end

    def _is_in_time(self, flight: Flight) -> bool:
        return flight.group > 0 and flight.lands <= self.groups[flight.group].latest

    def note(self, clients: Sequence[str], at_work: AtWork) -> None:
        """Update the speeds of clients that are done."""
        for client in clients:
            self.speeds[client] = self._speed_by(math.inf, client, at_work[client])

    def _speed_by(self, now: float, client: str, flight: Flight) -> float:
        """The speed in seconds per step of a client at work, as far as it is known at the time `now`."""
        if flight.lands > now:
            return self.speeds[client]
        last = max(SHORTEST, (flight.lands - flight.begins) / flight.steps)
        return (1 - NEWEST) * self.speeds.get(client, last) + NEWEST * last

    def keep_groups_of(self, at_work: AtWork) -> None:
        """Drop the groups that no client at work belongs to."""
        used = {flight.group for flight in at_work.values()}
        self.groups = {number: group for number, group in self.groups.items() if number in used}

    def saved(self) -> State:
        """The speeds and groups as entries of a checkpoint; empty where no speed is known."""
        state: State = {SPEED + client: speed for client, speed in self.speeds.items()}
        for number, group in self.groups.items():
            state |= {f"{EXPECTED}{number}": group.expected, f"{LATEST}{number}": group.latest}
        return state

    def resume(self, state: State) -> State:
        """Load the entries that `saved` wrote; returns the remaining entries of the checkpoint."""
        self.speeds = {n.removeprefix(SPEED): float(v) for n, v in state.items() if n.startswith(SPEED)}
        numbers = sorted(int(name.removeprefix(LATEST)) for name in state if name.startswith(LATEST))
        self.groups = {
            number: Group(float(state[f"{EXPECTED}{number}"]), float(state[f"{LATEST}{number}"]))
            for number in numbers
        }
        return {n: v for n, v in state.items() if not n.startswith((SPEED, EXPECTED, LATEST))}


def _steps(seconds: float, speed: float) -> int:
    """The whole number of steps of `speed` seconds each that fit into `seconds`, up to rounding errors."""
    return math.floor(seconds / speed + 1e-9)
