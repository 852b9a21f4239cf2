"""From the command to the end of the first round: `atoll simulate`, features cached, and Flower's engine.

Both are commands in processes of their own, so Python's start and every import are in the time. The
job is `jobs/bbc-news.toml` with one round; Flower's is a head on as many features (made up, so that
it has nothing to read) with as many clients on two actors. They take turns; medians.

    python -m benchmarks.start_up [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
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


def atoll() -> float:
    """Seconds until the first round's line is on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        keys = ["federation.rounds=1", "evaluate.baselines=[]"]
        command = [sys.executable, "-m", "atoll", "simulate", str(JOB), "--out", str(out)]
        command += [part for key in keys for part in ("--set", key)]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not ((lines := out / "metrics.jsonl").exists() and lines.stat().st_size):
                if process.poll() not in (None, 0):
                    raise SystemExit("atoll simulate failed")
                time.sleep(0.005)
            return time.perf_counter() - start
        finally:
            process.wait()


def flower() -> float:
    """Seconds until the first round is merged."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", FLOWER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "round done" in line:
                return time.perf_counter() - start
        raise SystemExit("Flower's engine ended without a round")
    finally:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    atoll()  # fills the cache
    times: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for name, system in (("Atoll", atoll), ("Flower's engine, 2 actors", flower)):
            times.setdefault(name, []).append(system())
    ours = statistics.median(times["Atoll"])
    print(f"{os.cpu_count()} cores, {options.repeats} repetitions, medians")
    print(f"{'':<28}{'seconds':>10}{'Atoll is':>10}")
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:<28}{middle:>10.2f}{middle / ours:>9.1f}x")


if __name__ == "__main__":
    main()
