"""A small CNN, trained in full: 32 x 32 x 3 images, 1,202,218 parameters, 100 clients of 50, 10 a round.

One local epoch, batches of 10, SGD 0.05, FedAvg weighted by examples, 20 rounds. Systems take
turns, a repetition each, and the table gives medians over the repetitions, in milliseconds a
round and in ratios. Images are generated: a smooth pattern a class, under noise. The others get
them as tensors; Atoll reads PNGs from Parquet, as a job does, and is measured end to end.

    python -m benchmarks.small_cnn [--repeats 5] [--rounds 20] [--only atoll,pfl-2]
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from atoll.job.job import Job
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.process_pool import PooledTransport
from atoll.sim.population.population import Population
from benchmarks import registered
from benchmarks.images import Images
from benchmarks.loop import plain_loop
from benchmarks.networks import accuracy, network_of
from benchmarks.turns import System, at_round_ends, chosen, options_of, peers, report, take_turns
from benchmarks.workload import Array, Outcome, Workload, seconds_between

CLIENTS, COHORT, EXAMPLES, BATCH, LR = 100, 10, 50, 10, 0.05
TOLERANCE = 0.02


def write_source(images: Images, path: Path) -> None:
    """The clients' images as PNGs in Parquet, with a column that says whose each is."""
    owners = np.repeat(np.arange(len(images.sizes)), images.sizes)
    cells = [{"bytes": png(pixels), "path": None} for pixels in images.pixels]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array(cells, kind),
        "label": [f"{target:03d}" for target in images.targets],
        "client": [f"{owner:04d}" for owner in owners],
    }
    pq.write_table(pa.table(columns), path)


def png(pixels: Array) -> bytes:
    """One image, encoded."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def job_of(folder: Path, rounds: int, threads: int, *, channels_last: bool = False) -> Job:
    """The job as a user would write it, but for the measuring, which is done at the end."""
    table: dict[str, Any] = {
        "name": "small-cnn",
        "seed": 1,
        "task": {"name": "image-classification"},
        "data": {
            "source": str(folder / "images.parquet"),
            "partition": {"kind": "natural", "by": "client"},
            "test_fraction": 0.0,
            "validation_fraction": 0.0,
        },
        "backbone": {
            "name": str(folder / "backbone"),
            "weights": "random",
            "channels_last": channels_last,
        },
        "tune": {"method": "full"},
        "train": {"batch_size": BATCH, "lr": LR, "threads": threads},
        "federation": {"clients": CLIENTS, "cohort": COHORT, "rounds": rounds},
        "evaluate": {"every": 1_000_000},
    }
    return Job.parse(table, origin="benchmark")


def atoll(workload: Workload, folder: Path, *, workers: int, threads: int, **options: bool) -> Outcome:
    """Atoll's engine on the very job; several workers are processes."""
    from atoll.server.rounds.loop import run_rounds
    from atoll.server.rounds.start import start_or_resume
    from atoll.server.run.directory import RunDirectory

    job = job_of(folder, workload.rounds, threads, **options)
    stamps: list[float] = []
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        population = Population.of(job)
        carrier = (
            stack.enter_context(PooledTransport(population, workers))
            if workers > 1
            else InlineTransport.of(population)
        )
        directory = stack.enter_context(RunDirectory.open(out, job, resume=False, force=False))
        run = start_or_resume(
            job,
            carrier,
            directory,
            lambda learner: None,
            at_round_ends(stamps),
            resume=False,
        )
        directory.commit()
        stamps.append(time.perf_counter())
        run_rounds(run)
    return seconds_between(stamps), accuracy(filled(workload, run.state.tensors), workload)


def filled(workload: Workload, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The plain network with Atoll's values: the same layers in the same order."""
    network = network_of(workload)
    assert len(tensors) == len(network.state_dict())
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    return network


def systems(workload: Workload, path: Path) -> list[System]:
    """What is compared, slowest last."""
    folder, cores = path.parent, os.cpu_count() or 1
    return [
        System(
            "atoll-last",
            "Atoll, 2 workers, channels_last",
            lambda: atoll(workload, folder, workers=2, threads=1, channels_last=True),
        ),
        System("atoll-2", "Atoll, 2 workers", lambda: atoll(workload, folder, workers=2, threads=1)),
        System("atoll-1", "Atoll, 1 worker", lambda: atoll(workload, folder, workers=1, threads=1)),
        System("atoll-threads", "Atoll, 2 threads", lambda: atoll(workload, folder, workers=1, threads=2)),
        System(
            "atoll-threads-last",
            "Atoll, 2 threads, channels_last",
            lambda: atoll(workload, folder, workers=1, threads=2, channels_last=True),
        ),
        System("loop-1", "plain PyTorch loop, 1 thread", lambda: plain_loop(workload, 1)),
        System("loop-2", "plain PyTorch loop, 2 threads", lambda: plain_loop(workload, 2)),
        *peers(path, threads=cores),
    ]


def main() -> int:
    """Run, and print the table."""
    options = options_of(__doc__).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    images = Images.make(CLIENTS, EXAMPLES)
    workload = images.workload(cohort=COHORT, batch=BATCH, lr=LR, rounds=options.rounds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "workload.safetensors"
        workload.save(path)
        write_source(images, folder / "images.parquet")
        registered.save(folder / "backbone")
        rows = take_turns(chosen(systems(workload, path), options.only), options.repeats)
    count = sum(p.numel() for p in network_of(workload).parameters())
    print(f"small CNN, {count:,} parameters, {CLIENTS} clients of {EXAMPLES} images, {COHORT} a round")
    return report(rows, workload, options.repeats, tolerance=TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
