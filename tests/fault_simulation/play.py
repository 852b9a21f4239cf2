"""Play one seed, and what came of it."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.fault_simulation.faults import Scenario
from tests.fault_simulation.hooks import Current
from tests.fault_simulation.invariants import violations
from tests.fault_simulation.jobs import passing_folder, shared_work
from tests.fault_simulation.observed import Observed
from tests.fault_simulation.world import World, a_world

COMMAND = "python -m tests.fault_simulation --from {seed} --seeds 1"

_numbers = itertools.count()


@dataclass
class Forgeries:
    """By kind: forged messages that were sent, those that the server read, and those it believed."""

    sent: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, seen: Observed) -> Forgeries:
        """Those that were seen."""
        read = Counter(one.kind for one in seen.judged)
        return cls(seen.forged, read, Counter(one.kind for one in seen.judged if not one.reason))

    def add(self, others: Forgeries) -> None:
        """Count others as well."""
        self.sent += others.sent
        self.read += others.read
        self.accepted += others.accepted

    def __str__(self) -> str:
        sent, read, accepted = (one.total() for one in (self.sent, self.read, self.accepted))
        return f"forged messages: {sent:,}, read by a server: {read:,}, accepted: {accepted:,}"


@dataclass(frozen=True)
class Outcome:
    """What came of a scenario: violations, the faults that happened, and the trace."""

    scenario: Scenario
    violations: tuple[str, ...]
    happened: Counter[str]
    forged: Forgeries
    trace: tuple[str, ...]
    ended: tuple[str, ...]

    def __str__(self) -> str:
        faults = "\n".join(
            f"  {f.kind} at {f.who}, time {f.at}, {f.amount:.3f}" for f in self.scenario.faults
        )
        return "\n".join(
            (
                f"seed {self.scenario.seed}: {COMMAND.format(seed=self.scenario.seed)}",
                f"{self.scenario.job}, {self.scenario.clients} clients, {self.scenario.rounds} rounds",
                faults, *self.violations,
            )
        )  # fmt: skip


@cache
def _folder() -> Path:
    return passing_folder(f"atoll-faults-{os.getpid()}-")


def play(scenario: Scenario, planted: AbstractContextManager[Any] | None = None) -> Outcome:
    """Play a scenario, perhaps with a bug; only within `hooks.simulated`."""
    undisturbed = undisturbed_model(scenario.quiet)
    with planted or nullcontext():
        world, seen = _played(scenario)
    found = violations(scenario, seen, undisturbed)
    return Outcome(
        scenario, tuple(found), seen.happened, Forgeries.of(seen), tuple(world.scheduler.trace),
        tuple(seen.ended),
    )  # fmt: skip


def _played(scenario: Scenario) -> tuple[World, Observed]:
    with a_world(scenario, _folder() / str(next(_numbers))) as world:
        Current.world = world
        try:
            seen = world.play()
            seen.lines = _lines(seen.out / "metrics.jsonl")
        finally:
            Current.world = None
        if seen.result is not None and not scenario.faults:
            _share(world)
    return world, seen


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # the disk was full, or a kill came
    return lines


def _share(world: World) -> None:
    """Keep what the sites have computed for the next ones."""
    work = shared_work()
    for machine in world.sites:
        if machine.site is not None and machine.site._learners:
            work.learners.setdefault(world.job.hash, dict(machine.site._learners))
            work.loaded.setdefault((world.job.hash, machine.name), dict(machine.site._cache._loaded))


@cache
def undisturbed_model(scenario: Scenario) -> str:
    """The model's SHA-256 where nothing goes wrong."""
    _, seen = _played(scenario)
    assert seen.result is not None, (scenario, seen.ended)
    found = violations(scenario, seen, seen.result.model_sha256)
    assert not found, (scenario, found)
    return str(seen.result.model_sha256)
