"""Large models in whole updates: seconds of a round, and the memory of the server, a site and a simulation.

A small encoder of texts with as many rows of embeddings as make it large is tuned in full, so that messages
are what costs. Real sites are processes on loopback, each with one client; "server" is what `atoll serve` and
all that it starts hold at most, "a site" the same of one `atoll join`. Memory is the processes' proportional
share (PSS) in MB; in parentheses it is without what is mapped from files, libraries and updates alike, which
the system can take back.

    python -m benchmarks.large_messages [--megabytes 50 200] [--sites 2 4] [--clients 2 8] [--rounds 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from atoll.job.job import Job
from atoll.server.deploy.provision import provision
from atoll.server.deploy.submit import submit
from atoll.sim.population.population import client_names
from atoll.sim.population.write_shards import write_shards
from atoll.system.child_process import free_port
from benchmarks.peak_memory import Held, Peak
from benchmarks.real_networks import encoder
from benchmarks.real_round import ROOT, started, wait_online

WIDTH = 256
EXAMPLES_PER_CLIENT = 8


def job_of(folder: Path, megabytes: int, clients: int, rounds: int) -> Job:
    """Full tuning of a network of that size."""
    network = folder / "network"
    if not network.exists():
        encoder(
            folder, "BertConfig", vocab_size=megabytes * 10**6 // 4 // WIDTH, hidden_size=WIDTH,
            num_hidden_layers=1, num_attention_heads=4, intermediate_size=WIDTH, max_position_embeddings=64,
        )  # fmt: skip
        rows = [
            f"the room was {('light', 'dark')[n % 2]} at {n},{n % 2}" for n in range(16 * EXAMPLES_PER_CLIENT)
        ]
        (folder / "texts.csv").write_text("\n".join(["text,label", *rows]))
    table = {
        "name": "large",
        "seed": 1,
        "task": {"name": "text-classification"},
        "data": {"source": str(folder / "texts.csv"), "classes": ["0", "1"], "validation_fraction": 0.25},
        "backbone": {"name": str(network), "weights": "random", "max_tokens": 16},
        "tune": {"method": "full"},
        "train": {"lr": 0.01, "batch_size": 4},
        "federation": {"clients": clients, "rounds": rounds},
    }
    return Job.parse(table, origin="benchmarks.large_messages")


def at_sites(job: Job, folder: Path) -> tuple[list[float], Held]:
    """(seconds of each round, the most that the server and a site held)."""
    names = client_names(job.federation.clients)
    sites = "".join(f'[[site]]\nname = "{name}"\n' for name in names)
    (folder / "sites.toml").write_text(f'[server]\nhost = "127.0.0.1"\nport = {free_port()}\n{sites}')
    provision(folder / "sites.toml", folder / "kits")
    write_shards(job, folder / "shards")
    server = folder / "kits" / "server"
    with ExitStack() as stack:
        processes = {"server": stack.enter_context(started(folder / "serve.log", "serve", str(server)))}
        for name in names:
            kit, data = folder / "kits" / name, folder / "shards" / name
            site = stack.enter_context(started(folder / f"{name}.log", "join", str(kit), str(data)))
            processes.setdefault("site", site)
        wait_online(server, len(names))
        peak = Peak(processes)
        peak.start()
        submit(job.canonical, server, out=folder / "run")
        return seconds_of(folder / "run"), peak.stop()


def seconds_of(out: Path) -> list[float]:
    """How long each round took."""
    return [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]


SIMULATED = """
import sys
from pathlib import Path
from atoll.server.events import ignore_events
from atoll.sim.engines.engine import simulate
from benchmarks.large_messages import job_of
folder, megabytes, clients, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
simulate(job_of(folder, megabytes, clients, rounds), folder / "run", on_event=ignore_events, report=False)
"""


def simulated(folder: Path, megabytes: int, clients: int, rounds: int) -> tuple[list[float], Held]:
    """(seconds of each round, the most that the process held)."""
    job_of(folder, megabytes, clients, rounds)
    arguments = [str(folder), str(megabytes), str(clients), str(rounds)]
    process = subprocess.Popen([sys.executable, "-c", SIMULATED, *arguments], cwd=ROOT)
    peak = Peak({"server": process.pid})
    peak.start()
    if process.wait():
        raise SystemExit(f"the simulation of {megabytes} MB ended with {process.returncode}")
    return seconds_of(folder / "run"), peak.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--sites", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--clients", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    print("| update, MB | | clients | a round, s | server, MB | a site, MB |\n|---|---|---|---|---|---|")
    for megabytes in args.megabytes:
        for clients in args.clients:
            with tempfile.TemporaryDirectory() as name:
                show(megabytes, "simulated", clients, *simulated(Path(name), megabytes, clients, args.rounds))
        for sites in args.sites:
            with tempfile.TemporaryDirectory() as name:
                job = job_of(Path(name), megabytes, sites, args.rounds)
                show(megabytes, "real sites", sites, *at_sites(job, Path(name)))


def show(megabytes: int, where: str, clients: int, seconds: list[float], mb: Held) -> None:
    """Print one line of the table."""
    held = ["{:.0f} ({:.0f})".format(*mb[name]) if name in mb else "" for name in ("server", "site")]
    print(f"| {megabytes} | {where} | {clients} | {median(seconds):.1f} | {' | '.join(held)} |", flush=True)


if __name__ == "__main__":
    main()
