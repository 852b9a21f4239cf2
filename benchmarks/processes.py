"""How long a worker process takes to be ready: the first, which waits for the fork server, and later ones.

A job of an image network tuned in full is what the fork server gets ready for. Beside it stands what a new
Python takes for the same imports, as a worker took before there was a fork server. They take turns; medians.

    python -m benchmarks.processes [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

COUNT = 4
"""Worker processes that are started one after the other."""

WORKERS = """
import os, time
from atoll.job.job import Job
from atoll.system.fork_server import import_first, worker_pool
from atoll.tasks.imports import imports_of
job = Job.parse({
    "name": "ready", "seed": 1, "task": {"name": "image-classification"}, "data": {"source": "digits"},
    "backbone": {"name": "torchvision:squeezenet1_1", "weights": "random"}, "tune": {"method": "full"},
    "federation": {"clients": 2, "rounds": 1}}, origin="benchmark")
if __name__ == "__main__":
    for _ in range(int(os.environ["COUNT"])):
        start = time.perf_counter()
        import_first("atoll.sim.engines.process_pool", *imports_of(job))
        pool = worker_pool(1, int)
        pool.submit(os.getpid).result()
        print(time.perf_counter() - start, flush=True)
"""
IMPORTS = "import atoll.sim.engines.process_pool, torch, torchmetrics.classification, torchvision.models"


def forked() -> list[float]:
    """Seconds until each of the workers has answered, in the order in which they were started."""
    env = os.environ | {"COUNT": str(COUNT), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", WORKERS], env=env, capture_output=True, text=True, check=True
    )
    return [float(line) for line in done.stdout.split()]


def anew() -> float:
    """Seconds that a new Python takes for a worker's imports."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    forked(), anew()  # Python keeps what it compiled
    workers: list[list[float]] = []
    new: list[float] = []
    for _ in range(options.repeats):
        workers.append(forked())
        new.append(anew())
    print(f"{os.cpu_count()} cores, {options.repeats} repetitions, medians of seconds")
    print(f"{'a new Python with the imports':<32}{statistics.median(new):>8.3f}")
    for number in range(COUNT):
        seconds = statistics.median(times[number] for times in workers)
        print(f"{f'worker {number + 1} from the fork server':<32}{seconds:>8.3f}")


if __name__ == "__main__":
    main()
