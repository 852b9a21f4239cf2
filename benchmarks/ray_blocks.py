"""What Flower's engine costs when clients travel in blocks, with 1 and with 2 workers.

MNIST's features, 1,000 clients of 50 examples, 200 a round, one epoch, batches of 10: Atoll on Ray
(`--engine ray`), where one message asks for a whole block's work, beside the same job in process.
The cost of a block is a round's time on Ray, less the time in process, over its blocks. Systems take
turns; medians over the repetitions of the median round, the first left out.

    python -m benchmarks.ray_blocks [--repeats 5] [--rounds 10]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import warnings
from pathlib import Path

from atoll.job.job import Job
from atoll.server.events import ignore_events

CLIENTS, COHORT = 1000, 200


def job_of(rounds: int) -> Job:
    """The workload."""
    table = {
        "name": "blocks",
        "seed": 1,
        "task": {"name": "image-classification"},
        "data": {
            "source": "mnist-5k",
            "partition": {"kind": "resampled", "examples": 50, "alpha": 0.3},
            "validation_fraction": 0.0,
        },
        "backbone": {"name": "torchvision:mobilenet_v2", "image_size": 64},
        "train": {"batch_size": 10, "lr": 0.05},
        "federation": {"clients": CLIENTS, "cohort": COHORT, "rounds": rounds + 1},
        "evaluate": {"every": 1_000_000, "clients": 1},
    }
    return Job.parse(table, origin="benchmark")


def seconds_a_round(job: Job, engine: str, workers: int) -> float:
    """The median round's; the first one, in which processes start and read, is left out."""
    from atoll.sim.engines.engine import simulate

    with tempfile.TemporaryDirectory() as folder:
        result = simulate(job, Path(folder) / "run", engine=engine, workers=workers, on_event=ignore_events)
    return statistics.median(line["seconds"] for line in result.rounds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    job = job_of(options.rounds)
    systems = {"in process": ("inline", 1), "Ray, 1 worker": ("ray", 1), "Ray, 2 workers": ("ray", 2)}
    times: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for name, (engine, workers) in systems.items():
            times.setdefault(name, []).append(seconds_a_round(job, engine, workers))
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"{os.cpu_count()} cores, {options.repeats} repetitions of {options.rounds} rounds, medians")
    print(f"{'':<18}{'ms a round':>12}{'clients/s':>12}{'ms a block':>12}")
    for name, (engine, workers) in systems.items():
        seconds = middle[name]
        cost = (seconds - middle["in process"] / workers) / workers if engine == "ray" else 0.0
        told = f"{cost * 1e3:>12.1f}" if engine == "ray" else f"{'-':>12}"
        print(f"{name:<18}{seconds * 1e3:>12.1f}{COHORT / seconds:>12,.0f}{told}")


if __name__ == "__main__":
    main()
