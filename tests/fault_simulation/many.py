"""Many seeds, in as many processes as there are cores, and what they come to."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from tests.fault_simulation.faults import FORGERIES, POINTS, Scenario
from tests.fault_simulation.hooks import simulated
from tests.fault_simulation.play import Forgeries, Outcome, play

ENOUGH_SEEDS = 3000
"""So many seeds after which every kind of fault must have happened."""
AT_A_TIME = 20


@dataclass
class Tally:
    """What a number of seeds came to."""

    kinds: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    forged: Forgeries = field(default_factory=Forgeries)
    failures: list[Outcome] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        self.kinds[outcome.scenario.job] += 1
        self.happened += outcome.happened
        self.forged.add(outcome.forged)
        if outcome.violations:
            self.failures.append(outcome)

    @property
    def never(self) -> list[str]:
        """Kinds of faults that did not happen, or came to nothing, where there were seeds enough."""
        if self.kinds.total() < ENOUGH_SEEDS:
            return []
        return [
            kind for kind in POINTS if not (self.forged.read if kind in FORGERIES else self.happened)[kind]
        ]


def play_seeds(seeds: Iterable[int]) -> Tally:
    """Play these seeds in this process."""
    torch.set_num_threads(1)
    tally, began = Tally(), time.process_time()
    with simulated():
        for seed in seeds:
            tally.add(play(Scenario.of(seed)))
    tally.cpu_seconds = time.process_time() - began
    return tally


def played_by_all_cores(first: int, number: int) -> Iterator[Tally]:
    """The tallies of parts of the seeds, as they come."""
    parts = [range(n, min(n + AT_A_TIME, first + number)) for n in range(first, first + number, AT_A_TIME)]
    torch.set_num_threads(1)
    cores = min(len(os.sched_getaffinity(0)), len(parts))
    if cores == 1:
        yield from map(play_seeds, parts)
        return
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        yield from pool.imap_unordered(play_seeds, parts)
        pool.close()
        pool.join()
