"""How long a warm round of real sites takes, and where its time goes.

Makes kits and shards in a temporary folder, starts a server and four sites on loopback, runs the
demo job, and stops all. Rounds from the second on are warm: backbone, features and shard are there.

    python benchmarks/real_round.py [--rounds 12] [--sites 4]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from atoll.job.job import Job
from atoll.server.deploy.provision import provision
from atoll.server.deploy.status import status
from atoll.server.deploy.submit import submit
from atoll.sim.population.population import client_names
from atoll.sim.population.write_shards import write_shards
from atoll.system.child_process import free_port

ROOT = Path(__file__).parents[1]
STARTER = """
import logging, sys
from pathlib import Path
logging.basicConfig(format="%(created)f %(message)s", level=logging.WARNING)
logging.getLogger("atoll.client").setLevel(logging.INFO)
from atoll.client.deploy.join import join
from atoll.server.deploy.serve import serve
if sys.argv[1] == "serve":
    serve(Path(sys.argv[2]))
else:
    join(Path(sys.argv[2]), [Path(sys.argv[3])])
"""
LINE = re.compile(r"([0-9.]+) round (\d+) of \S+ train \S+?(: done in .*)?")


@contextmanager
def started(log: Path, *arguments: str) -> Iterator[int]:
    """A server or a site, for the time of the block; its process."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", STARTER, *arguments], cwd=ROOT, stdout=output, stderr=output
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def wait_online(server: Path, count: int) -> None:
    """Return once so many sites are connected."""
    while not (server / "state" / "serve.json").exists() or len(status(server).online) < count:
        time.sleep(0.2)


def watch(metrics: Path, seen: list[tuple[float, dict[str, Any]]], ended: threading.Event) -> None:
    """Note when each round's line is written."""
    while not ended.wait(0.003):
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        seen += [(time.time(), json.loads(line)) for line in lines[len(seen) :]]


def run(sites: int, rounds: int, folder: Path) -> tuple[list[tuple[float, dict[str, Any]]], list[Path]]:
    """Play the demo job over real sites; when each round ended with its line, and the sites' logs."""
    names = client_names(sites)
    table = "".join(f'[[site]]\nname = "{name}"\n' for name in names)
    (folder / "sites.toml").write_text(f'[server]\nhost = "127.0.0.1"\nport = {free_port()}\n{table}')
    provision(folder / "sites.toml", folder / "kits")
    settings = {"clients": sites, "cohort": sites, "rounds": rounds}
    job = Job.load(ROOT / "jobs" / "bbc-news.toml", [f"federation.{k}={v}" for k, v in settings.items()])
    write_shards(job, folder / "shards")
    server, logs = folder / "kits" / "server", [folder / f"{name}.log" for name in names]
    seen: list[tuple[float, dict[str, Any]]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(folder / "run" / "metrics.jsonl", seen, ended))
    with ExitStack() as stack:
        stack.enter_context(started(folder / "serve.log", "serve", str(server)))
        for name, log in zip(names, logs, strict=True):
            kit, data = folder / "kits" / name, folder / "shards" / name
            stack.enter_context(started(log, "join", str(kit), str(data)))
        wait_online(server, sites)
        watcher.start()
        try:
            submit(job.canonical, server, out=folder / "run")
        finally:
            ended.set()
            watcher.join()
    return seen, logs


def work_of(log: Path) -> dict[int, tuple[float, float]]:
    """When a site began and ended each round's training."""
    begun: dict[int, float] = {}
    found = {}
    for line in log.read_text(errors="replace").splitlines():
        if match := LINE.fullmatch(line):
            when, number = float(match[1]), int(match[2])
            if match[3] is None:
                begun[number] = when
            else:
                found[number] = (begun[number], when)
    return found


def shares(seen: list[tuple[float, dict[str, Any]]], logs: list[Path]) -> dict[str, list[float]]:
    """Seconds of every warm round by what they were spent on; the site that begins last counts."""
    sites = [work_of(log) for log in logs]
    table: dict[str, list[float]] = {name: [] for name in ROWS}
    for (before, _), (end, line) in pairwise(seen):
        start = end - line["seconds"]
        back = start + line["seconds_at_clients"]
        spans = [site[line["round"]] for site in sites]
        first, last = min(b for b, _ in spans), max(e for _, e in spans)
        table["round"].append(end - before)
        table["until the first site works"].append(first - start)
        table["sites at work, first to last"].append(last - first)
        table["until the last reply is here"].append(back - last)
        table["merge and evaluate"].append(end - back)
        table["checkpoint"].append(start - before)
    return table


ROWS = (
    "round",
    "until the first site works",
    "sites at work, first to last",
    "until the last reply is here",
    "merge and evaluate",
    "checkpoint",
)


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        seen, logs = run(options.sites, options.rounds, Path(name))
        table = shares(seen, logs)
    print(f"{options.sites} sites, {len(table['round'])} warm rounds; seconds")
    print(f"{'':32}{'median':>8}{'min':>8}{'max':>8}")
    for name, values in table.items():
        print(f"{name:32}{median(values):8.3f}{min(values):8.3f}{max(values):8.3f}")


if __name__ == "__main__":
    main()
