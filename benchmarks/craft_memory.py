"""What training in 16 bits, in parts of a batch, or with activations computed twice saves and costs.

    python -m benchmarks.craft_memory [CASE …] [--seeds 5]        # pictures, texts

`pictures`: MobileNetV2, tuned whole on 40 MNIST digits at each of 5 clients, in batches of 32. `texts`:
LoRA on MiniLM, on 32 articles at each of 5 clients, a batch each. A run is a process of its own; "memory"
is the most that its training held beyond what the process held before the first round, in MB, and "time"
the median round's, as a share of the plain run's of the same seed. Intervals are Student's, 95 % over
seeds; a seed deals the data anew and starts the head anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.craft import BASE, Table, merged, told, train
from protocol.job import Job
from sim.frontier import Estimate

CASES: dict[str, Table] = {
    "pictures": {
        "task": {"name": "image-classification"},
        "data": {"source": "mnist-5k", "partition": {"kind": "resampled", "examples": 50}},
        "backbone": {"name": "torchvision:mobilenet_v2", "image_size": 64},
        "tune": {"method": "full"},
        "train": {"lr": 0.001, "batch_size": 32, "optimizer": "adam"},
        "federation": {"clients": 5, "rounds": 6},
    },
    "texts": {
        "task": {"name": "text-classification"},
        "data": {"source": "bbc-news", "partition": {"kind": "resampled", "examples": 40}},
        "backbone": {"name": "hf:all-MiniLM-L6-v2", "max_tokens": 64},
        "tune": {"method": "lora", "rank": 8},
        "train": {"lr": 0.003, "batch_size": 32, "optimizer": "adam"},
        "federation": {"clients": 5, "rounds": 4},
    },
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


def run_here(case: str, way: str, seed: int) -> Trained:
    """Play the job in this process, which should have done nothing before."""
    from server.result import peak_rss_mb
    from sim.engine import simulate

    before = after = 0.0

    def watch(step: str, what: dict[str, Any]) -> None:
        nonlocal before, after
        if step == "hello":
            before = held_mb()
        if step == "round":  # the measuring at the end isn't training
            after = peak_rss_mb()

    table = merged(BASE, CASES[case], WAYS[way], {"name": case, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        result = simulate(Job.parse(table, origin=case), Path(folder) / "run", watch=watch, report=False)
    seconds = statistics.median(line["seconds"] for line in result["rounds"][1:])
    return Trained(result["final"]["server"]["accuracy"], seconds, after - before)


def held_mb() -> float:
    """What this process has in memory now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_a_process(case: str, way: str, seed: int) -> Trained:
    """`run_here` in a new process."""
    command = [sys.executable, "-m", "benchmarks.craft_memory", "--one", case, way, str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Trained(**json.loads(done.stdout.splitlines()[-1]))


def line(way: str, runs: list[Trained], plain: list[Trained]) -> str:
    """One row of the table."""
    pairs = list(zip(runs, plain, strict=True))
    values = [
        told(Estimate.of([run.accuracy for run in runs])),
        ""
        if runs is plain
        else told(Estimate.of([run.accuracy - other.accuracy for run, other in pairs]), "+"),
        told(Estimate.of([run.seconds / other.seconds for run, other in pairs])),
    ]
    return (
        f"{way:<26}"
        + "".join(f"{v:>18}" for v in values)
        + f"{statistics.mean(r.memory for r in runs):>10.0f}"
    )


def main() -> None:
    """Every way of every case that is asked for takes its turn with each seed; a table a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--one", nargs=3, metavar=("CASE", "WAY", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.one:
        case, way, seed = options.one
        print(json.dumps(asdict(run_here(case, way, int(seed)))))
        return
    for case in options.cases or CASES:
        seeds = range(1, options.seeds + 1)
        runs: dict[str, list[Trained]] = {way: [] for way in WAYS}
        for seed in seeds:
            for way in WAYS:
                runs[way].append(in_a_process(case, way, seed))
        print(f"{case}, seeds 1 to {options.seeds}")
        print(f"{'':<26}{'accuracy':>18}{'change':>18}{'time, of plain':>18}{'memory':>10}")
        for way in WAYS:
            print(line(way, runs[way], runs["plain"]))
        print(flush=True)


if __name__ == "__main__":
    main()
