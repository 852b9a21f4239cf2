"""How LoRA's merges compare on unlike shards: test accuracy, how far merges are off, and bytes.

    python -m benchmarks.lora_merges [NAME …]

Six clients whose news of five classes are dealt by Dirichlet(0.3), 8 articles of a class at most, MiniLM
with LoRA of rank 4 in its last two layers, 4 local epochs of Adam in batches of 8, 4 rounds. A figure is the
mean over three seeds with its 95 % t-interval; a seed's data and batches are the same for all.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from atoll.job.job import Job
from atoll.report.run_result import RunResult
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.sweep.results import Estimate
from benchmarks.metrics import defined, in_percent, mean_and_half

SEEDS = (1, 2, 3)
MERGES = ("average", "ffa", "rolora", "fedex", "flora", "flexlora", "fedsb")


def run(merge: str, seed: int) -> RunResult:
    """What `result.json` says of one run."""
    job = Job.parse(
        {
            "name": "lora-merges",
            "seed": seed,
            "task": {"name": "text-classification"},
            "data": {"source": "bbc-news", "partition": {"kind": "dirichlet", "alpha": 0.3}, "shots": 8},
            "backbone": {"name": "hf:all-MiniLM-L6-v2", "max_tokens": 24},
            "tune": {"method": "lora", "rank": 4, "layers": 2, "lora_merge": merge},
            "train": {"lr": 0.003, "batch_size": 8, "epochs": 4, "optimizer": "adam"},
            "federation": {"clients": 6, "rounds": 4},
            "evaluate": {"every": 4},
        },
        origin="benchmark",
    )
    with tempfile.TemporaryDirectory() as folder:
        return simulate(job, Path(folder) / "run", on_event=ignore_events, report=False)


def relative_error(result: RunResult) -> float:
    """The mean over rounds and layers, in percent."""
    lines = [line["aggregation_error"]["layers"].values() for line in result.rounds]
    return 100 * statistics.mean(layer["relative"] for layers in lines for layer in layers)


def main(names: Sequence[str]) -> None:
    """Print the table, a row for each way of merging."""
    head = ("`lora_merge`", "accuracy, %", "error, % of the mean product", "MB up", "MB down")
    sys.stdout.write(f"| {' | '.join(head)} |\n|{'---|' * len(head)}\n")
    for name in names or MERGES:
        found = [run(name, seed) for seed in SEEDS]
        sizes = (f"{getattr(found[0], key) / 1e6:.1f}" for key in ("bytes_up", "bytes_down"))
        accuracy = in_percent([defined(result.final["server"]["accuracy"]) for result in found])
        error = mean_and_half(Estimate.of([relative_error(result) for result in found]), digits=2)
        sys.stdout.write(f"| {name} | {accuracy} | {error} | {' | '.join(sizes)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
