"""`python -m tests.fault_simulation --seeds N [--from SEED|new] [--shrink SEED]`: faults by the thousand."""

from __future__ import annotations

import argparse
import secrets
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.fault_simulation.faults import POINTS, Scenario
from tests.fault_simulation.hooks import simulated
from tests.fault_simulation.many import Tally, played_by_all_cores
from tests.fault_simulation.play import play
from tests.fault_simulation.shrink import shrunk

console = Console(highlight=False)

SHOWN = 20
"""Failures that are written out."""
MANY = 5000
"""So many seeds have every kind of fault, or something is wrong with them."""


def simulate(first: int, number: int) -> int:
    """Play that many seeds from the first on and say what came of them; the exit status."""
    whole, began = Tally(), time.monotonic()
    console.print(f"seeds from {first} on")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("federations", total=number)
        for tally in played_by_all_cores(first, number):
            whole.kinds += tally.kinds
            whole.happened += tally.happened
            whole.forged.add(tally.forged)
            whole.cpu_seconds += tally.cpu_seconds
            for outcome in tally.failures:
                whole.failures.append(outcome)
                if len(whole.failures) <= SHOWN:
                    console.print(f"{outcome}\n", markup=False)
            progress.advance(task, tally.kinds.total())
    seconds = time.monotonic() - began
    console.print(f"{whole.kinds.total()} federations in {seconds:.0f} s ({whole.cpu_seconds:.0f} s of CPU):")
    for kind, count in whole.kinds.most_common():
        console.print(f"  {count:6} {kind}")
    console.print(f"{whole.happened.total()} faults:")
    for kind in POINTS:
        console.print(f"  {whole.happened[kind]:6} {kind}", markup=False)
    console.print(f"{whole.forged}")
    for kind in whole.never:
        console.print(f"no fault of this kind ever happened: {kind}", markup=False)
    for outcome in whole.failures[:SHOWN]:  # once more, for logs are cut from above
        console.print(f"{outcome}\n", markup=False)
    console.print(f"{len(whole.failures)} failures")
    return 1 if whole.failures or (whole.never and number >= MANY) else 0


def shrink(seed: int) -> int:
    """Say which few of a seed's faults make it fail."""
    torch.set_num_threads(1)
    with simulated():
        outcome = shrunk(Scenario.of(seed), play)
    console.print(f"{outcome}\n\n{chr(10).join(outcome.trace)}", markup=False)
    return 1


def seed_of(text: str) -> int:
    """A seed as it is written; `new` is one from the system's entropy, below 2^63."""
    return secrets.randbits(63) if text == "new" else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault_simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="how many federations")
    parser.add_argument(
        "--from", type=seed_of, default=0, dest="first", metavar="SEED",
        help="the first seed, below 2^64; `new`: one that nobody has played",
    )  # fmt: skip
    parser.add_argument("--shrink", type=int, help="the seed of a failure: which of its faults are needed")
    given = parser.parse_args()
    return simulate(given.first, given.seeds) if given.shrink is None else shrink(given.shrink)


if __name__ == "__main__":
    sys.exit(main())
