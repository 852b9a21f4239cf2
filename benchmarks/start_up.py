"""How long a command takes to answer, and to its first round: beside Python, torch and Flower's engine.

Each is a command in a process of its own, so Python's start and every import are in the time. The job is
`jobs/bbc-news.toml` with its features cached: until its first round is on the disk, where that round isn't
measured, and where it is, as in the file; the first measurement waits for torchmetrics. Flower's is a head
on as many features (made up, so that it has nothing to read) with as many clients on two actors. They take
turns; medians.

    python -m benchmarks.start_up [--repeats 5] [--only help,round]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

JOB = Path(__file__).parent.parent / "jobs" / "bbc-news.toml"

FLOWER = """
import logging, numpy as np, torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
logging.getLogger("flwr").setLevel(logging.CRITICAL)
client, server = ClientApp(), ServerApp()
@client.train()
def train(message, context):
    import torch
    state = message.content.array_records["arrays"].to_torch_state_dict()
    model = torch.nn.Linear(384, 5)
    model.load_state_dict(state)
    x, y = torch.randn(100, 384), torch.randint(5, (100,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in torch.randperm(100).split(16):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": 100, "one": 1})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.0, min_available_nodes=20)
    first = ArrayRecord(torch.nn.Linear(384, 5).state_dict())
    result = strategy.start(grid=grid, initial_arrays=first, num_rounds=1)
    print("round done" if result.train_metrics_clientapp else "nothing trained", flush=True)
run_simulation(server, client, num_supernodes=20, backend_config={
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    "init_args": {"num_cpus": 2, "log_to_driver": False, "logging_level": logging.ERROR}})
"""


@dataclass
class Timed:
    """What one command took, each time: seconds, and the most memory."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    @property
    def middle(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)


def whole(command: Sequence[str]) -> tuple[float, float]:
    """(seconds, megabytes at most) of a command, from its start to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, used.ru_maxrss / 1024


def atoll(*keys: str) -> tuple[float, float]:
    """(seconds until the first round's line is on the disk, megabytes of the whole run)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        given = ("federation.rounds=1", "evaluate.baselines=[]", *keys)
        command = [sys.executable, "-m", "atoll", "simulate", str(JOB), "--out", str(out)]
        command += [part for key in given for part in ("--set", key)]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not ((lines := out / "metrics.jsonl").exists() and lines.stat().st_size):
            if process.poll() is not None:
                raise SystemExit("atoll simulate failed")
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return seconds, used.ru_maxrss / 1024


def flower() -> tuple[float, float]:
    """(seconds until the first round is merged, megabytes of its own process)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", FLOWER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    seconds = next((time.perf_counter() - start for line in process.stdout if "round done" in line), None)
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if seconds is None:
        raise SystemExit("Flower's engine ended without a round")
    return seconds, used.ru_maxrss / 1024


@dataclass(frozen=True)
class Command:
    """One line of the table: how it is run, and what it is compared with, and may take of that."""

    name: str
    run: Callable[[], tuple[float, float]]
    beside: str = ""
    most: float = 0.0


COMMANDS = {
    "python": Command("python -c pass", partial(whole, ("-c", "pass"))),
    "help": Command("atoll --help", partial(whole, ("-m", "atoll", "--help")), "python", 15),
    "list": Command("atoll list backbones", partial(whole, ("-m", "atoll", "list", "backbones")), "python"),
    "torch": Command('python -c "import torch"', partial(whole, ("-c", "import torch"))),
    "round": Command("to the first round", partial(atoll, "evaluate.every=2"), "torch", 1.6),
    "measured": Command("to the first round, measured", atoll, "torch"),
    "flower": Command("Flower's engine, 2 actors", flower, "torch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(COMMANDS), help="some of: %(default)s")
    options = parser.parse_args()
    asked = set(options.only.split(","))
    if odd := asked - set(COMMANDS):
        parser.error(f"--only: expected some of {', '.join(COMMANDS)}, found {', '.join(sorted(odd))}")
    needed = asked | {COMMANDS[key].beside for key in asked} - {""}
    atoll()  # fills the cache of features, and Python's of compiled modules
    found = {key: Timed() for key in COMMANDS if key in needed}
    for _ in range(options.repeats):
        for key, timed in found.items():
            seconds, megabytes = COMMANDS[key].run()
            timed.seconds.append(seconds)
            timed.megabytes.append(megabytes)
    print(f"{os.cpu_count()} cores, {options.repeats} repetitions, medians; memory: the most of all")
    print(f"{'':<30}{'seconds':>10}{'MB':>8}  beside")
    for key, timed in found.items():
        took = f"{timed.middle:>10.3f}{max(timed.megabytes):>8.0f}"
        print(f"{COMMANDS[key].name:<30}{took}  {beside(key, found)}".rstrip())


def beside(key: str, found: dict[str, Timed]) -> str:
    """How many times the command it is compared with it takes, and how many were asked for."""
    command = COMMANDS[key]
    if not command.beside:
        return ""
    times = found[key].middle / found[command.beside].middle
    asked = f" (asked for: {command.most:g} at most)" if command.most else ""
    return f"{times:.1f}x {COMMANDS[command.beside].name}{asked}"


if __name__ == "__main__":
    main()
