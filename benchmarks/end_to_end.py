"""A frozen backbone end to end: 20 clients, all of them in each of 20 rounds, one local epoch.

MiniLM on BBC news (64 tokens) and MobileNetV2 on MNIST (96 pixels), a linear head. Atoll with the
features cached from nothing, with the cache warm, and with the backbone run anew for every batch;
and Flower's engine on two actors, whose clients run the backbone in the same code. Times are from
the start of the run to its end in seconds, without starting Python and importing. Systems take
turns, a repetition each; medians.

    python -m benchmarks.end_to_end [--repeats 5] [--rounds 20] [--only minilm|mobilenet]
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from atoll.job.job import Job
from atoll.server.events import ignore_events

CLIENTS = 20
BACKBONES: dict[str, dict[str, Any]] = {
    "minilm": {
        "task": {"name": "text-classification"},
        "data": {"source": "bbc-news", "partition": {"kind": "resampled", "examples": 16}},
        "backbone": {"name": "hf:all-MiniLM-L6-v2", "max_tokens": 64},
    },
    "mobilenet": {
        "task": {"name": "image-classification"},
        "data": {"source": "mnist-5k", "partition": {"kind": "resampled", "examples": 20}},
        "backbone": {"name": "torchvision:mobilenet_v2", "image_size": 96},
    },
}


def job_of(name: str, rounds: int) -> Job:
    """The workload as a job; no test set, for measuring would hide what training costs."""
    table = BACKBONES[name] | {
        "name": name,
        "seed": 3,
        "train": {"batch_size": 8, "lr": 0.1},
        "federation": {"clients": CLIENTS, "rounds": rounds},
        "evaluate": {"every": 1_000_000, "clients": 1},
    }
    table["data"] = table["data"] | {"test_fraction": 0.0, "validation_fraction": 0.0}
    return Job.parse(table, origin="benchmark")


UNCACHED = "ATOLL_BENCHMARK_UNCACHED"


def forget_features() -> None:
    """Train as if features could not be kept: the backbone runs on every batch."""
    Job.backbone_is_frozen = property(lambda self: False)  # type: ignore[assignment]


if os.environ.get(UNCACHED):  # a worker process imports this module before anything else
    forget_features()


def atoll(job: Job, cache: Path) -> float:
    """Seconds of a run with features kept in `cache`."""
    from atoll.sim.engines.engine import simulate

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("atoll.learning.features.cache_root", lambda: cache),
    ):
        start = time.perf_counter()
        simulate(job, Path(folder) / "run", workers=os.cpu_count() or 1, on_event=ignore_events)
        return time.perf_counter() - start


def atoll_uncached(job: Job) -> float:
    """Seconds of a run whose worker processes, one a core, run the backbone on every batch."""
    from atoll.sim.engines.engine import simulate

    before = Job.backbone_is_frozen
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {UNCACHED: "1"}):
        forget_features()
        start = time.perf_counter()
        try:
            simulate(job, Path(folder) / "run", workers=os.cpu_count() or 1, on_event=ignore_events)
        finally:
            Job.backbone_is_frozen = before  # type: ignore[method-assign]
        return time.perf_counter() - start


def flower(job: Job) -> float:
    """Seconds of Flower's engine; its start on Ray is in it, as is Atoll's own start above."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from atoll.learning.learner import Learner
    from atoll.sim.population.population import Population
    from atoll.tasks import task_named

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    client, server = ClientApp(), ServerApp()
    text, trained = job.canonical, list[int]()
    start = time.perf_counter()
    population = Population.of(job)
    data_info = task_named(job.task.name).merge_info(population.roster(job).data_info)
    first = Learner.of(job, task_named(job.task.name), data_info).initial()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        import torch  # noqa: F401 - Flower looks whether it was imported

        from benchmarks.end_to_end import train_one

        arrays = message.content.array_records["arrays"].to_torch_state_dict()
        place = int(context.node_config["partition-id"])
        moved, count = train_one(text, data_info, arrays, place)
        content = RecordDict(
            {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": count, "one": 1})}
        )
        return Message(content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(first), num_rounds=job.federation.rounds
        )
        trained.extend(result.train_metrics_clientapp)

    run_simulation(
        server,
        client,
        num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "log_to_driver": False, "logging_level": logging.ERROR},
        },
    )
    if len(trained) != job.federation.rounds:
        raise SystemExit(f"Flower's engine trained in {len(trained)} of {job.federation.rounds} rounds")
    return time.perf_counter() - start


_warm: dict[str, Any] = {}


def train_one(job_json: str, data_info: dict[str, Any], tensors: Any, place: int) -> tuple[Any, int]:
    """In a Ray actor: one client's local epoch, the backbone run on every batch; (its head, examples).

    Source and backbone stay loaded in the actor, as a careful user would have it.
    """
    import torch

    from atoll.client.training.local_sgd import train_model
    from atoll.learning.learner import Learner
    from atoll.sim.population.population import Population
    from atoll.tasks import task_named

    torch.set_num_threads(1)
    if job_json not in _warm:
        job = Job.from_json(job_json)
        task = task_named(job.task.name)
        _warm[job_json] = (job, Population.of(job), Learner.of(job, task, data_info))
    job, population, learner = _warm[job_json]
    name = population.names(job)[place]
    shard = learner.task.shard(population.dataset(job, name), data_info)
    update = train_model(learner, tensors, shard, job, client=name, round=1, plan={})
    return {n: tensors[n] + d for n, d in update.delta.items()}, len(shard)


def systems(job: Job) -> dict[str, Callable[[], float]]:
    """What is compared; the warm run follows the one that filled its cache."""
    cache = Path(tempfile.mkdtemp())
    return {
        "Atoll, cache from nothing": lambda: atoll(job, cache),
        "Atoll, warm cache": lambda: atoll(job, cache),
        "Atoll, no cache": lambda: atoll_uncached(job),
        "Flower's engine, 2 actors": lambda: flower(job),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=sorted(BACKBONES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{os.cpu_count()} cores, medians of {options.repeats} repetitions of {options.rounds} rounds")
    for name in [options.only] if options.only else BACKBONES:
        job = job_of(name, options.rounds)
        times: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            for system, measure in systems(job).items():
                times.setdefault(system, []).append(measure())
        middle = {system: statistics.median(values) for system, values in times.items()}
        print(f"\n{name:<28}{'seconds':>10}{'no cache / this':>18}{'Flower / this':>16}")
        for system, seconds in middle.items():
            against = [middle["Atoll, no cache"] / seconds, middle["Flower's engine, 2 actors"] / seconds]
            print(f"{system:<28}{seconds:>10.2f}{against[0]:>17.1f}x{against[1]:>15.1f}x")


if __name__ == "__main__":
    main()
