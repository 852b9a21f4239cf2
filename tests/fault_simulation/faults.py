"""What a seed decides: the job's kind and size, and a plain list of faults, each at its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

SERVER = 0
"""Whom a fault befalls: the server, or the site of this number, from 1 on."""


@dataclass(frozen=True)
class Fault:
    """A fault at the `at`-th time, from 1 on, that `who` comes to a point of its kind.

    `amount`, from 0 to 1, says how long, how far or where in the act.
    """

    kind: str
    who: int
    at: int
    amount: float

    @property
    def point(self) -> str:
        return POINTS[self.kind]

    @property
    def comes_too_late(self) -> bool:
        """Whether it is a forged reply behind the honest one, which nobody looks at."""
        return self.kind in FORGERIES and self.amount >= BEFORE


REQUEST, REPLY, WORK = "a request on its way", "a reply on its way", "a site at work"
PULL, PUSH, START = "the server asks for replies", "the server sends", "the server starts"
WRITE, SYNC, RENAME = "write", "fsync", "rename"

POINTS: Mapping[str, str] = {
    "request dropped": REQUEST, "request delayed": REQUEST, "request twice": REQUEST,
    "request torn": REQUEST, "request corrupted": REQUEST,
    "reply dropped": REPLY, "reply delayed": REPLY, "reply twice": REPLY, "reply torn": REPLY,
    "reply corrupted": REPLY, "reply of an earlier round": REPLY, "reply under another's name": REPLY,
    "reply for another as well": REPLY, "reply after its deadline": REPLY,
    "reply changed under its seal": REPLY, "reply sent again for another request": REPLY,
    "reply sent again under this request's claims": REPLY, "reply of another under its name": REPLY,
    "reply under another site's seal": REPLY, "reply without its seal": REPLY,
    "site killed before its work": WORK, "site killed after its work": WORK, "site loses power": WORK,
    "site cut off": WORK, "data unreadable": WORK, "refused work asked for all the same": REQUEST,
    "server killed": PULL, "server loses power": PULL, "push broken off": PUSH,
    "checkpoint damaged": START,
    "disk full": WRITE, "write fails": WRITE, "killed at a write": WRITE, "power lost at a write": WRITE,
    "sync fails": SYNC, "killed at a sync": SYNC, "power lost at a sync": SYNC,
    "rename fails": RENAME, "killed at a rename": RENAME, "power lost at a rename": RENAME,
}  # fmt: skip
"""Each kind of fault, and the point at which it happens."""

FORGERIES = (
    "reply changed under its seal", "reply sent again for another request",
    "reply sent again under this request's claims", "reply of another under its name",
    "reply under another site's seal", "reply without its seal",
)  # fmt: skip
"""Those of a forger on the wire; each is in the honest reply's place, before it or after it."""
IN_PLACE, BEFORE = 0.5, 0.75
"""Amounts below which a forged reply replaces the honest one, or comes before it; else it comes after."""

REFUSED = "refused work asked for all the same"
AT_SERVER = {PULL, PUSH, START}
AT_BOTH = {WRITE, SYNC, RENAME}

SIZES: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "fedavg": ((3, 2, 20), (4, 3, 20), (2, 6, 10), (6, 4, 6), (10, 3, 3), (3, 20, 3)),
    "fedadam": ((3, 3, 12), (5, 4, 4), (2, 8, 5), (4, 20, 1)),
    "scaffold": ((3, 3, 14), (2, 8, 8), (5, 5, 4), (3, 20, 1)),
    "client privacy": ((3, 3, 14), (5, 3, 5), (3, 10, 3)),
    "example privacy": ((3, 2, 8), (2, 4, 6), (4, 3, 3)),
    "secure sum": ((4, 1, 10), (4, 2, 5), (5, 2, 1)),
    "compressed": ((3, 3, 8), (2, 6, 4), (5, 4, 2)),
}
"""Of each kind of job (clients, rounds, weight): large federations are there, and small ones often."""


@dataclass(frozen=True)
class Scenario:
    """A federation to play; `refusing` is the number of a site whose policy refuses the job, 0 for none.

    `again` says that another run of the same job was begun at the same sites before, and given up after a
    few seconds, if it wasn't at its end.
    """

    seed: int
    job: str
    clients: int
    rounds: int
    refusing: int
    again: bool
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, seed: int) -> Scenario:
        """The scenario of a seed below 2^64."""
        random = Random(seed)
        kinds = [(job, *size) for job, sizes in SIZES.items() for size in sizes]
        ((job, clients, rounds, _),) = random.choices(kinds, [weight for *_, weight in kinds])
        refusing = random.randrange(1, clients + 1) if clients > 2 and random.random() < 0.15 else 0
        if job == "secure sum":
            refusing = 0
        bare = cls(seed, job, clients, rounds, refusing, again=random.random() < 0.1, faults=())
        number = random.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 8))
        faults = [_fault(random, bare) for _ in range(number)]
        if refusing and random.random() < 0.5:
            faults.append(Fault(REFUSED, refusing, 1, 0.0))
        faults += _forgeries(bare)
        return replace(bare, faults=tuple(faults))

    @property
    def quiet(self) -> Scenario:
        """The same federation, in which nothing goes wrong."""
        return replace(self, seed=0, faults=(), again=False)

    def without(self, place: int) -> Scenario:
        """The same without one of the faults."""
        return replace(self, faults=self.faults[:place] + self.faults[place + 1 :])


def _forgeries(scenario: Scenario) -> list[Fault]:
    """What a forger does, by chance of its own, so that the seed's other faults are what they are without."""
    random = Random(f"forger {scenario.seed}")
    messages = _points(REPLY, scenario)
    return [
        Fault(
            random.choice(FORGERIES), random.randrange(1, scenario.clients + 1),
            random.randrange(1, messages + 1), random.random(),
        )
        for _ in range(random.choice((0, 0, 0, 1, 2, 3, 4, 6)))
    ]  # fmt: skip


def _fault(random: Random, scenario: Scenario) -> Fault:
    kind = random.choice([kind for kind in POINTS if kind != REFUSED and kind not in FORGERIES])
    point = POINTS[kind]
    if point in AT_SERVER:
        who = SERVER
    else:
        who = random.randrange(0 if point in AT_BOTH else 1, scenario.clients + 1)
        if point in AT_BOTH and random.random() < 0.6:
            who = SERVER
    return Fault(kind, who, random.randrange(1, 1 + _points(point, scenario)), random.random())


def _points(point: str, scenario: Scenario) -> int:
    """About how many points of that kind there are."""
    stages = 5 if scenario.job == "secure sum" else 1
    messages = scenario.rounds * stages + 2
    return {
        REQUEST: messages, REPLY: messages, WORK: messages, PUSH: messages, PULL: 6 * messages, START: 2,
        WRITE: 3 + 2 * scenario.rounds, SYNC: 3 + scenario.rounds, RENAME: 2 + scenario.rounds,
    }[point]  # fmt: skip
