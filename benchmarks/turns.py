"""Systems that take turns on one workload, a repetition each, and the table of what came out."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from atoll.server.events import Event, EventCallback, RoundEnded
from benchmarks.environments import Environment, NotInstalled, environment_of, versions_of
from benchmarks.workload import Outcome, Workload

ROOT = Path(__file__).parents[1]
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
}


class Failed(Exception):
    """A system ended without an answer."""


@dataclass(frozen=True)
class System:
    """One row: `key` is what --only calls it; a limit learns nothing."""

    key: str
    name: str
    run: Callable[[], Outcome]
    limit: bool = False


@dataclass
class Row:
    """What a system did in its turns."""

    system: System
    seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    missing: str = ""

    def take_turn(self) -> None:
        """Run once; the first round is a warm-up."""
        if self.missing:
            return
        try:
            seconds, accuracy = self.system.run()
        except (NotInstalled, Failed) as reason:
            self.missing = str(reason)
            return
        self.seconds.append(statistics.median(seconds[1:] or seconds))
        self.accuracies.append(accuracy)

    @property
    def done(self) -> bool:
        return not self.missing and bool(self.seconds)

    @property
    def middle(self) -> float:
        return statistics.median(self.seconds)

    @property
    def accuracy(self) -> float:
        return statistics.median(self.accuracies)


def at_round_ends(stamps: list[float]) -> EventCallback:
    """What notes the moment at which each of Atoll's rounds ends."""

    def note(event: Event) -> None:
        if isinstance(event, RoundEnded):
            stamps.append(time.perf_counter())

    return note


def peer(
    key: str, name: str, workload: Path, *, module: str = "", processes: int = 1, threads: int = 1
) -> System:
    """A peer in its own environment; several processes are started by torchrun, as pfl asks for."""
    peer_name = module or key

    def run() -> Outcome:
        environment = environment_of(peer_name)
        several = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        start = [*(several if processes > 1 else []), "benchmarks.peers", peer_name, str(workload)]
        return _answer(environment, start, threads)

    return System(key, name, run)


def _answer(environment: Environment, start: list[str], threads: int) -> Outcome:
    with tempfile.TemporaryDirectory() as home:
        variables = os.environ | QUIET
        variables |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "FLWR_HOME": home}
        command = [str(environment.python), "-m", *start]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"seconds"'):
            answer = json.loads(line)
            return answer["seconds"], answer["accuracy"]
    told = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
    raise Failed(f"failed: {(told or done.stderr.splitlines() or ['it said nothing'])[-1][:150]}")


def peers(workload: Path, threads: int) -> list[System]:
    """All of them, each in the setting that is its fastest on this machine's cores."""
    cores = os.cpu_count() or 1
    return [
        peer("fedjax", "FedJAX", workload, threads=threads),
        peer("fedlab", "FedLab", workload, threads=threads),
        peer("fluke", "fluke", workload, threads=threads),
        peer("pfl-1", "pfl, 1 process", workload, module="pfl", threads=threads),
        peer(f"pfl-{cores}", f"pfl, {cores} processes", workload, module="pfl", processes=cores),
        peer("flower", f"Flower's engine, {cores} actors", workload),
    ]


def options_of(text: str | None) -> argparse.ArgumentParser:
    """What every script with turns takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", metavar="NAME,...", help="these systems, such as atoll,pfl-2")
    return parser


def chosen(systems: Sequence[System], only: str) -> list[System]:
    """Those that are named; `pfl` names pfl-1 and pfl-2."""
    names = [name for name in only.split(",") if name]
    known = {system.key for system in systems} | {system.key.split("-")[0] for system in systems}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--only: no system {unknown[0]!r}, expected some of {', '.join(sorted(known))}")
    return [s for s in systems if not names or s.key in names or s.key.split("-")[0] in names]


def take_turns(systems: Sequence[System], repeats: int) -> list[Row]:
    """Every system once, then every system once more, and so on."""
    rows = [Row(system) for system in systems]
    for number in range(repeats):
        for row in rows:
            print(f"repetition {number + 1}: {row.system.name}", file=sys.stderr, flush=True)
            row.take_turn()
    return rows


def report(rows: Sequence[Row], workload: Workload, repeats: int, *, tolerance: float) -> int:
    """Print the table, and answer with the script's exit status."""
    print(f"{os.cpu_count()} cores, {repeats} repetitions of {workload.rounds} rounds, medians")
    own = min((r.middle for r in rows if r.done and r.system.key.startswith("atoll")), default=float("nan"))
    print(f"{'':<28}{'ms a round':>12}{'best':>10}{'clients/s':>12}{'Atoll is':>10}{'accuracy':>10}")
    for row in rows:
        if not row.done:
            print(f"{row.system.name:<28}  {row.missing}")
            continue
        times = f"{row.middle * 1e3:>12.2f}{min(row.seconds) * 1e3:>10.2f}"
        rates = f"{workload.cohort / row.middle:>12,.0f}{row.middle / own:>9.1f}x"
        print(f"{row.system.name:<28}{times}{rates}" + ("" if row.system.limit else f"{row.accuracy:>10.3f}"))
    _say_faster(rows, own)
    _say_versions(rows)
    return _agreement(rows, tolerance)


def _say_faster(rows: Sequence[Row], own: float) -> None:
    """Ratios to systems that have more than one setting, in their faster one."""
    print('"Atoll is": Atoll in its faster setting beside the row')
    both = {row.system.name: row.middle for row in rows if row.done and row.system.key.startswith("pfl")}
    if len(both) > 1:
        name = min(both, key=both.__getitem__)
        print(f"pfl in its faster setting ({name}): Atoll is {both[name] / own:.1f}x")


def _say_versions(rows: Sequence[Row]) -> None:
    print(f"Python {platform.python_version()}, torch {torch.__version__}; peers' pins:")
    for key in dict.fromkeys(row.system.key.split("-")[0] for row in rows if row.done):
        pins = versions_of(key)
        if pins:
            print(f"  {key}: {pins}")
    if any(row.system.key == "flower" and row.done for row in rows):
        import flwr
        import ray

        print(f"  flower: flwr=={flwr.__version__} ray=={ray.__version__} (Atoll's own environment)")


def _agreement(rows: Sequence[Row], tolerance: float) -> int:
    """1 if some system failed, or has not learnt what the others have."""
    learnt = [row for row in rows if row.done and not row.system.limit]
    status = int(any(row.missing.startswith("failed") for row in rows))
    middle = statistics.median(row.accuracy for row in learnt) if learnt else 0.0
    for row in learnt:
        if abs(row.accuracy - middle) > tolerance:
            print(f"{row.system.name}: accuracy {row.accuracy:.3f}, the others' {middle:.3f} ± {tolerance}")
            status = 1
    return status
