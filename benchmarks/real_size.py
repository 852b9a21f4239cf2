"""Networks that people name, at their own size with random weights: memory, seconds, bytes for each tuning.

Two clients, two rounds, few and short examples, so that what is held is the network, and what is kept
beside it, more than activations. Every run is a process of its own; memory is that of its whole tree. "Times
the model" is what it held at most beyond what it held before, over the network's size, without pages of
files, such as kept updates and libraries, which the system can take back at any time.

    python -m benchmarks.real_size [--only bert-base] [--ways full lora] [--workers 1] [--optimizer sgd]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peak_memory import Peak
from benchmarks.real_networks import SUBJECTS

LR = 0.0001
"""Random ResNets and their kin, whose normalisation keeps its statistics, diverge at more."""
PRIVATE = {"noise_multiplier": 1.0, "delta": 1e-3, "clipping_norm": 1.0, "seeded_noise": True}
WAYS: dict[str, dict[str, Any]] = {
    "head": {"tune": {"method": "head"}},
    "last-k": {"tune": {"method": "last-k", "layers": 1}},
    "lora": {"tune": {"method": "lora"}},
    "full": {"tune": {"method": "full"}},
    "lora, private clients": {"tune": {"method": "lora"}, "privacy": PRIVATE | {"unit": "client"}},
    "full, private clients": {"tune": {"method": "full"}, "privacy": PRIVATE | {"unit": "client"}},
    "lora, private examples": {
        "tune": {"method": "lora"},
        "train": {"lr": LR},
        "privacy": PRIVATE | {"unit": "example", "sampling_rate": 0.4, "steps": 3},
    },
}


def run(subject: str, way: str, workers: int, optimizer: str, rounds: int, size_mb: float) -> dict[str, Any]:
    """Play the job in this process, which has done nothing before; `refused` says why a job can't be.

    `size_mb` is the network's size, or 0 where it is to be found out.
    """
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from atoll.errors import InputError
    from atoll.export.safetensors import tensors_of
    from atoll.job.job import Job
    from atoll.server.events import ignore_events
    from atoll.sim.engines.engine import simulate
    from atoll.trained import trained

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = {
            "name": "real-size", "seed": 1, "train": {"lr": LR, "batch_size": 4, "optimizer": optimizer},
            "federation": {"clients": 2, "rounds": rounds},
        } | SUBJECTS[subject](folder) | WAYS[way]  # fmt: skip
        peak = Peak({"run": os.getpid()})
        before = peak.look()["run"]
        peak.start()
        try:
            result = simulate(
                Job.parse(table, origin="benchmark"), folder / "run", on_event=ignore_events, report=False,
                workers=workers,
            )  # fmt: skip
        except InputError as error:
            return {"refused": str(error)}
        whole, own = peak.stop()["run"]
        if not size_mb:
            tensors = tensors_of(trained(folder / "run")[0].model).values()
            size_mb = sum(t.numel() * t.element_size() for t in tensors) / 1e6
    return {
        "seconds": result.seconds,
        "held_mb": whole,
        "own_mb": own - before[1],
        "network_mb": size_mb,
        "sent_mb": result.bytes_up / rounds / 2 / 1e6,
    }


def played(subject: str, way: str, options: list[str]) -> tuple[str, str, float]:
    """(a line of the table, why there is nothing in it, the network's MB), from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.real_size", "--one", subject, way, *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"ended by signal {-ended.returncode}"])[-1]
        return f"| {subject} | | {way} | failed | | | |", f"{subject}, {way}: {last}", 0
    found = json.loads(ended.stdout.splitlines()[-1])
    if "refused" in found:
        return f"| {subject} | | {way} | refused | | | |", f"{subject}, {way}: {found['refused']}", 0
    line = (
        f"| {subject} | {found['network_mb']:.0f} | {way} | {found['sent_mb']:.2f} MB"
        f" | {found['held_mb']:.0f} MB | {found['own_mb'] / found['network_mb']:.1f}"
        f" | {found['seconds']:.0f} |"
    )
    return line, "", found["network_mb"]


def main() -> None:
    """Each network with each way of tuning, a line each; below, why some are refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--size-mb", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        subject, way = given.one
        found = run(subject, way, given.workers, given.optimizer, given.rounds, given.size_mb)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    sys.stdout.write("| network | MB | tuned | sent by a client | memory | times the model | seconds |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    reasons = []
    options = ["--workers", str(given.workers), "--optimizer", given.optimizer, "--rounds", str(given.rounds)]
    for subject in given.only:
        size_mb = 0.0
        for way in given.ways:
            line, why, found_mb = played(subject, way, [*options, "--size-mb", str(size_mb)])
            size_mb = size_mb or found_mb
            reasons += [why] if why else []
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    sys.stdout.write("\n" + "".join(f"- {why}\n" for why in reasons))


if __name__ == "__main__":
    main()
