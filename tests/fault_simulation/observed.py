"""What is seen of a federation from outside while it is played; the invariants are about this."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.report.run_result import RunResult

Origin = tuple[str, str, int]
"""(client, run, round) that an update was made for."""


@dataclass(frozen=True)
class Merged:
    """One round's merge: whose updates (client, SHA-256), and the model before and after."""

    life: int
    run: str
    round: int
    updates: tuple[tuple[str, str], ...]
    before: str
    after: str


@dataclass(frozen=True)
class Asked:
    """One training request that a life of the server has sent."""

    life: int
    run: str
    round: int
    model: str


@dataclass(frozen=True)
class Judged:
    """What the server made of one client's part of a forged message; without a reason it believed it."""

    life: int
    kind: str
    client: str
    reason: str


@dataclass
class Observed:
    """Everything that invariants look at."""

    made: dict[str, set[Origin]] = field(default_factory=lambda: defaultdict(set))
    """Of each update that left a site, by its SHA-256: for whom it was made."""
    merged: list[Merged] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    written: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Checkpoints of the run that were handed to the disk, by round: hashes of what they hold."""
    durable: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Those of them whose writing came back."""
    resumed: list[tuple[int, int, str]] = field(default_factory=list)
    """(life, round, hash) of checkpoints that a life went on from."""
    begun: dict[int, int] = field(default_factory=dict)
    """By life of the server: the newest round whose checkpoint was on the disk as it began."""
    sums: list[str] = field(default_factory=list)
    """Secure sums that weren't the sum of the vectors that went in."""
    released: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Noised releases that somebody saw, by ledger."""
    charged: Counter[str] = field(default_factory=Counter)
    """What each ledger holds at the end."""
    worked: set[tuple[str, str]] = field(default_factory=set)
    """(site, job) that were trained, or measured."""
    leaks: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    """How each life of the server ended, in words."""
    crashes: list[str] = field(default_factory=list)
    """Errors that no user should see."""
    most: Counter[str] = field(default_factory=Counter)
    """The largest that each queue and memory was."""
    happened: Counter[str] = field(default_factory=Counter)
    """Faults by kind."""
    forged: Counter[str] = field(default_factory=Counter)
    """Messages that a forger has sent, by kind of fault."""
    judged: list[Judged] = field(default_factory=list)
    """Those of them that the server has read."""
    logged: set[tuple[int, str, str]] = field(default_factory=set)
    """(life, client, reason) of each refusal that the server's log was told."""
    killed: set[int] = field(default_factory=set)
    """Lives of the server that were ended from outside, perhaps before they wrote what they had seen."""
    result: RunResult | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    """The run's `metrics.jsonl`."""
    out: Path = Path()
    refused: tuple[str, str] | None = None
    """(site, job) that the site's policy refuses."""

    def largest(self, what: str, size: int) -> None:
        self.most[what] = max(self.most[what], size)
