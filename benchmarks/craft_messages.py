"""What cheaper messages cost in quality: a job with every way to compress its updates, over several seeds.

    python -m benchmarks.craft_messages [JOB …] [--seeds 5] [--rounds N]

Without a job it is `jobs/bbc-news.toml`; others must measure accuracy on the server's test set.
A seed deals the data anew and starts the head anew. The interval beside each accuracy is Student's, 95 % over
seeds; "to none" is the mean of the differences to the run of the same seed without compression, with its own.
Bytes are those of the tensors that one client sends in one round, as counted in `result.json`.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from atoll.job.job import Job
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from atoll.sim.sweep.results import Estimate
from benchmarks.metrics import defined

JOBS = Path(__file__).parents[1] / "jobs"
WAYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fp16": ("compression='fp16'",),
    "int8": ("compression='int8'",),
    "int4": ("compression='int4'",),
    "top-k 1 %": ("compression='top-k'",),
    "sign": ("compression='sign'",),
    "fp16, no feedback": ("compression='fp16'", "error_feedback=false"),
    "int8, no feedback": ("compression='int8'", "error_feedback=false"),
    "int4, no feedback": ("compression='int4'", "error_feedback=false"),
    "top-k 1 %, no feedback": ("compression='top-k'", "error_feedback=false"),
    "sign, no feedback": ("compression='sign'", "error_feedback=false"),
}


@dataclass(frozen=True)
class Measured:
    """One run: how good its model is in the end, and what one client sent in one round."""

    accuracy: float
    bytes_up: float


def measured(path: Path, way: tuple[str, ...], seed: int, rounds: int | None, out: Path) -> Measured:
    """The job with this way to compress, played once."""
    changes = [f"federation.{change}" for change in way]
    changes += [f"seed={seed}", "evaluate.baselines=[]", "evaluate.every=1000000"]
    changes += [] if rounds is None else [f"federation.rounds={rounds}"]
    result = simulate(Job.load(path, changes), out, on_event=ignore_events, report=False)
    accuracy = defined(result.final["server"]["accuracy"])
    return Measured(accuracy, result.bytes_up / max(1, result.clients_trained))


def line(name: str, runs: list[Measured], plain: list[Measured]) -> str:
    """One row of the table."""
    accuracy = Estimate.of([run.accuracy for run in runs])
    to_none = Estimate.of([run.accuracy - other.accuracy for run, other in zip(runs, plain, strict=True)])
    sent, whole = runs[0].bytes_up, plain[0].bytes_up
    apart = "" if runs is plain else f"{to_none.mean:+.3f}{spread(to_none)}"
    return f"{name:<24}{accuracy.mean:>8.3f}{spread(accuracy)}{apart:>18}{sent:>12,.0f}{whole / sent:>8.1f}x"


def spread(estimate: Estimate) -> str:
    """Half of the interval; nothing where there is one seed."""
    return "" if estimate.half is None else f" ± {estimate.half:.3f}"


def main() -> None:
    """Run every way with every seed, and print a table for each job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("jobs", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=None)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    for path in options.jobs or [JOBS / "bbc-news.toml"]:
        job = Job.load(path)
        rounds = options.rounds or job.federation.rounds
        print(f"{job.name}, {rounds} rounds, seeds 1 to {options.seeds}")
        print(f"{'':<24}{'accuracy':>16}{'to none':>18}{'bytes up':>12}{'smaller':>9}", flush=True)
        plain: list[Measured] = []
        with tempfile.TemporaryDirectory() as folder:
            for name, way in WAYS.items():
                runs = [
                    measured(path, way, seed, options.rounds, Path(folder) / f"{name}-{seed}")
                    for seed in range(1, options.seeds + 1)
                ]
                plain = plain or runs
                print(line(name, runs, plain), flush=True)
        print()


if __name__ == "__main__":
    main()
