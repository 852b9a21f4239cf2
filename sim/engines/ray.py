"""Runs a job on Flower's simulation engine over Ray, on this machine or on a cluster.

A virtual node hosts a block of clients, and one message requests the work of all of them, so that the
engine's overhead is paid once per block. With RAY_ADDRESS set, Ray joins that cluster and its workers do the
work; otherwise it starts on this machine with as many CPUs as workers.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from atoll import plugins
from atoll.client.app import register
from atoll.client.site import Site
from atoll.data.dataset import Dataset
from atoll.data.diagnostics import Counts
from atoll.job.job import Job
from atoll.learning.determinism import is_gpu, shared_gpus
from atoll.report.run_result import RunResult
from atoll.server.app import FlowerTransport
from atoll.server.rounds.run_state import TestSet
from atoll.server.run.run_job import run_job
from atoll.sim.attacks.hostile_clients import attacked
from atoll.sim.engines.process_pool import books_in
from atoll.sim.population.population import Population, client_names
from atoll.tasks import trains_on_features

BLOCKS_PER_WORKER = 4
"""How many blocks each worker gets where clients train one by one, so that workers end at a similar time."""

_populations: dict[str, Population] = {}
_sites: dict[tuple[str, int, int], Site] = {}


@dataclass(frozen=True)
class Block:
    """The clients of one virtual node: every n-th of the population."""

    population: Population
    number: int
    total: int

    def names(self, job: Job) -> Sequence[str]:
        return self.population.names(job)[self.number :: self.total]

    def dataset(self, job: Job, client: str) -> Dataset:
        return self.population.dataset(job, client)

    def counts(self, job: Job, client: str) -> Sequence[Counts]:
        """Always empty: the run has the counts of the whole source."""
        return ()

    def fingerprint(self, job: Job, client: str) -> str:
        """Always empty: simulated clients' rows are fixed for the run."""
        return ""


def block_site(job: Job, context: Context, out: Path, loaded: Sequence[str]) -> Site:
    """In a Ray actor: the site of a virtual node.

    All actors must reach the folder `out` and the plugin files that the run has `loaded`.
    """
    plugins.load_files(loaded)
    config = context.node_config
    number, total = int(config["partition-id"]), int(config["num-partitions"])
    key = (job.hash, number, total)
    if job.hash not in _populations:
        _populations[job.hash] = Population.of(job)
    if key not in _sites:
        ledgers, memory = books_in(out)
        _sites[key] = Site(Block(_populations[job.hash], number, total), ledgers=ledgers, memory=memory)
    return _sites[key]


def share_of_gpus(device: str, workers: int) -> float:
    """How many GPUs Ray reserves for each worker, in whole ones or ten-thousandths of one.

    The workers share those of this machine; of a cluster, every machine should have as many.
    """
    if not is_gpu(device):
        return 0.0
    return min(1.0, math.floor(10_000 * shared_gpus(device) / workers) / 10_000)


def simulate_on_ray(
    job: Job, out: Path, workers: int, test_set: TestSet, options: dict[str, Any]
) -> RunResult:
    """Run a job on Flower's engine over Ray; `options` are keyword arguments of `run_job`."""
    results: list[RunResult] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        flower = FlowerTransport(grid, "ray", uses_masking=False, resend_after=math.inf)
        transport = attacked(flower, job, client_names(job.federation.clients))
        results.append(run_job(job, transport, out, test_set, **options))

    client, folder = ClientApp(), out.resolve()
    loaded = [plugin.file for plugin in plugins.files()]
    register(client, lambda job, context: block_site(job, context, folder, loaded))
    per_worker = 1 if trains_on_features(job) else BLOCKS_PER_WORKER
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers * job.train.threads}
    if not logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # the carrier tells of each failed reply
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run_simulation(
            server,
            client,
            num_supernodes=min(job.federation.clients, workers * per_worker),
            backend_config={
                "client_resources": {
                    "num_cpus": job.train.threads,
                    "num_gpus": share_of_gpus(job.train.device, workers),
                },
                "init_args": {"log_to_driver": False, "logging_level": logging.ERROR, **local},
            },
        )
    return results[0]
