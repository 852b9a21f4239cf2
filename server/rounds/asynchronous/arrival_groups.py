"""How many local steps each client takes, so that clients of different speeds are done together.

COMPASS, the scheduler of FedCompass (Li et al. 2024, "FedCompass: Efficient Cross-Silo Federated Learning on
Heterogeneous Client Devices Using a Computing Power-Aware Scheduler"), in its symbols:

    S_i            seconds that a local step takes client i, after each task 0.1 S_i + 0.9 (time / steps)
    T_a, T_max     when group a is expected, and until when it is waited for: now + Q S_i and
                   now + lambda Q S_i for the client that opens it with Q steps
    Q_min, Q_max   bounds of every client's steps: `min_steps`, `max_steps`; lambda is `latest_factor`

A client that starts joins the group that lets it take the most steps, of those with

    Q_min <= floor((T_a - now) / S_i) <= Q_max

Where there is none it opens one. Its Q is then the most steps, up to Q_max and at least Q_min, with which it
is done when the fastest client j of some open group a can be done for the second time:

    floor((T_max + Q_max S_j - now) / S_i)

and Q_max where no group leaves it that few. A client of which no speed is known takes Q_min steps alone.
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
"""Names in a checkpoint: by client its seconds a step; by group the times of its arrival."""

NEWEST = 0.9
"""How much the last task counts in a client's speed, as in the authors' code."""
SHORTEST = 1e-12
"""The least seconds that a step is taken to last."""

AtWork = Mapping[str, "Flight"]
"""Clients at work, by name."""


@dataclass(frozen=True)
class Group:
    """When a group of clients is expected to be done, and until when it is waited for."""

    expected: float
    latest: float


@dataclass
class ArrivalGroups:
    """The clients' speeds, in seconds a local step, and the groups of those at work, by number from 1."""

    speeds: dict[str, float] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)

    def in_order(self, clients: Sequence[str]) -> list[str]:
        """Clients in the order in which they get work: the fastest first, those of no known speed last."""
        return sorted(clients, key=lambda client: (self.speeds.get(client, math.inf), client))

    def assigned(
        self, client: str, now: float, at_work: AtWork, options: FedCompassOptions
    ) -> tuple[int, int, Group | None]:
        """(the client's local steps, the number of its group, that group's times); 0 and None in no group.

        Call `open` with the last two if the client really starts.
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
        """Remember the group of a client that has started."""
        if group is not None:
            self.groups[number] = group

    def next_merge(self, at_work: AtWork) -> tuple[list[str], float]:
        """(the clients that are merged next, by name; when). Nobody where nobody is at work.

        A group is merged when all of it are done, or at its latest time those that are. A client that is done
        later, or is in no group, is merged when it is done.
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
        """Learn the speeds of clients that are done."""
        for client in clients:
            self.speeds[client] = self._speed_by(math.inf, client, at_work[client])

    def _speed_by(self, now: float, client: str, flight: Flight) -> float:
        """The speed of a client at work, as it is known by now."""
        if flight.lands > now:
            return self.speeds[client]
        last = max(SHORTEST, (flight.lands - flight.begins) / flight.steps)
        return (1 - NEWEST) * self.speeds.get(client, last) + NEWEST * last

    def keep_groups_of(self, at_work: AtWork) -> None:
        """Forget the groups of which nobody is at work."""
        used = {flight.group for flight in at_work.values()}
        self.groups = {number: group for number, group in self.groups.items() if number in used}

    def saved(self) -> State:
        """What a checkpoint keeps; nothing where no speed is known."""
        state: State = {SPEED + client: speed for client, speed in self.speeds.items()}
        for number, group in self.groups.items():
            state |= {f"{EXPECTED}{number}": group.expected, f"{LATEST}{number}": group.latest}
        return state

    def resume(self, state: State) -> State:
        """Take back what `saved` said; what is left is others'."""
        self.speeds = {n.removeprefix(SPEED): float(v) for n, v in state.items() if n.startswith(SPEED)}
        numbers = sorted(int(name.removeprefix(LATEST)) for name in state if name.startswith(LATEST))
        self.groups = {
            number: Group(float(state[f"{EXPECTED}{number}"]), float(state[f"{LATEST}{number}"]))
            for number in numbers
        }
        return {n: v for n, v in state.items() if not n.startswith((SPEED, EXPECTED, LATEST))}


def _steps(seconds: float, speed: float) -> int:
    """How many whole steps that take `speed` seconds each fit, but for rounding errors in the last bits."""
    return math.floor(seconds / speed + 1e-9)
