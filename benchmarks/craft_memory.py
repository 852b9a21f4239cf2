"""What training in 16 bits, in parts of a batch, or with activations computed twice saves and costs.

    python -m benchmarks.craft_memory [--seeds 5]

LoRA on MiniLM, on 32 articles at each of 5 clients, a batch each. A run is a process of its own; "memory"
is the most that its training held beyond what the process held before the first round, in MB, and "time"
the median round's, as a share of the plain run's of the same seed. Intervals are Student's, 95 % over
seeds; a seed deals the data anew and starts the head anew.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from atoll.job.job import Job
from atoll.server.events import ClientsFound, Event, RoundEnded
from atoll.sim.sweep.results import Estimate
from benchmarks.craft import BASE, Table, merged, train
from benchmarks.metrics import defined, mean_and_half

TEXTS: Table = {
    "name": "texts",
    "task": {"name": "text-classification"},
    "data": {"source": "bbc-news", "partition": {"kind": "resampled", "examples": 40}},
    "backbone": {"name": "hf:all-MiniLM-L6-v2", "max_tokens": 64},
    "tune": {"method": "lora", "rank": 8},
    "train": {"lr": 0.003, "batch_size": 32, "optimizer": "adam"},
    "federation": {"clients": 5, "rounds": 4},
}

WAYS: dict[str, Table] = {
    "plain": {},
    "bf16": train(precision="bf16"),
    "fp16": train(precision="fp16"),
    "accumulate 4": train(accumulate=4),
    "checkpoint_activations": train(checkpoint_activations=True),
    "bf16, both": train(precision="bf16", accumulate=4, checkpoint_activations=True),
}


@dataclass(frozen=True)
class Trained:
    """One run: accuracy in the end, the median round's seconds, MB that training held."""

    accuracy: float
    seconds: float
    memory: float


def run(way: str, seed: int) -> Trained:
    """Play the job in this process, which has done nothing before."""
    from atoll.sim.engines.engine import simulate
    from atoll.system.memory import own_peak_mb

    logging.disable(logging.WARNING)
    before = after = 0.0

    def on_event(event: Event) -> None:
        nonlocal before, after
        if isinstance(event, ClientsFound):
            before = held_mb()
        if isinstance(event, RoundEnded):  # the measuring at the end isn't training
            after = own_peak_mb()

    table = merged(BASE, TEXTS, WAYS[way], {"seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(
            Job.parse(table, origin="benchmark"), Path(folder) / "run", on_event=on_event, report=False
        )
    seconds = statistics.median(line["seconds"] for line in result.rounds[1:])
    return Trained(defined(result.final["server"]["accuracy"]), seconds, after - before)


def held_mb() -> float:
    """What this process has in memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def line(way: str, runs: list[Trained], plain: list[Trained]) -> str:
    """One row of the table."""
    pairs = list(zip(runs, plain, strict=True))
    accuracy = mean_and_half(Estimate.of([run.accuracy for run in runs]))
    change = mean_and_half(Estimate.of([run.accuracy - other.accuracy for run, other in pairs]), "+")
    share = mean_and_half(Estimate.of([run.seconds / other.seconds for run, other in pairs]))
    memory = statistics.mean(run.memory for run in runs)
    return f"{way:<26}{accuracy:>18}{'' if runs is plain else change:>18}{share:>18}{memory:>10.0f}"


def main() -> None:
    """Every way takes its turn with each seed; one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    alone = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    runs: dict[str, list[Trained]] = {way: [] for way in WAYS}
    for seed in range(1, seeds + 1):
        for way in WAYS:
            runs[way].append(alone.submit(run, way, seed).result())
    print(f"texts, seeds 1 to {seeds}")
    print(f"{'':<26}{'accuracy':>18}{'change':>18}{'time, of plain':>18}{'memory':>10}")
    for way in WAYS:
        print(line(way, runs[way], runs["plain"]))


if __name__ == "__main__":
    main()
