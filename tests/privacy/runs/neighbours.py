"""How far a client's released sum moves when one example comes: what noise is to cover, in clipping norms.

The sums are those of the real path: the client's split, its draws, its clipped gradients. Neighbours are
made by one example more at the beginning, in the middle, at the end, and by one that is there already.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.dispatch import LocalWork, updates_of
from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.dp_sgd_model import model_sums
from atoll.client.dp.poisson import private_training
from atoll.client.dp.secure_aggregation import SecureAggregationSession
from atoll.client.shard_cache import LoadedClients, LoadedShard
from atoll.client.state.store import ClientStateStore
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning.learner import Learner
from atoll.learning.split import split_shard
from atoll.privacy.dp_plan import dp_plan_of
from atoll.protocol.requests import TrainRequest
from atoll.sim.population.population import Population
from atoll.tasks import task_named
from tests.privacy.detectors import Detected, silent
from tests.support.small import grey_png_shard, image_job
from tests.support.task_data import ready
from tests.support.task_jobs import job_of

Vector = NDArray[np.float64]

C = 0.5
EXAMPLES: dict[str, Any] = {
    "unit": "example", "noise_multiplier": 1.0, "delta": 1e-5, "clipping_norm": C, "sampling_rate": 1.0,
    "seeded_noise": True,
}  # fmt: skip
KEPT_ALL: dict[str, Any] = {"source": "digits", "validation_fraction": 0.0}


def pictures(**tables: Any) -> tuple[Learner, Shard]:
    """SqueezeNet with random weights, its last block tuned, and 24 pictures."""
    given: dict[str, Any] = {
        "tune": {"method": "last-k", "layers": 1}, "data": KEPT_ALL, "privacy": EXAMPLES,
        "train": {"lr": 1.0, "batch_size": 1, "dropout": 0.5},
    }  # fmt: skip
    job = image_job("squeezenet1_1", **given | tables)
    learner = Learner.of(job, task_named(job.task.name), {"classes": ["0", "1", "2"]})
    return learner, in_order(grey_png_shard(24, classes=3))


def in_order(shard: Shard) -> Shard:
    """The shard in canonical order."""
    return shard.select(sorted(range(len(shard)), key=shard.keys.__getitem__))


def of_task(task: str, method: str, folder: Path, count: int, **tables: Any) -> tuple[Learner, Shard]:
    """The small job of a task, and so many of its examples."""
    folder.mkdir(parents=True, exist_ok=True)
    job = ready(job_of(task, method, privacy=EXAMPLES, **tables), folder)
    population = Population.of(job)
    learner = Learner.of(job, task_named(task), population.roster(job).data_info[0])
    whole = population.whole(learner)
    rows = np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int).tolist()
    return learner, whole.select(rows)


def quiet(job: Job) -> DpSgd:
    """The client's own protection with coins that take everybody, and noise of zero."""
    dp_plan = dp_plan_of(job, "example")
    assert dp_plan is not None
    return replace(private_training(job, dp_plan, 1, {}), random_bits=lambda client: silent, divisor=1.0)


def summed(learner: Learner, shard: Shard) -> Vector:
    """What a client would noise of its whole model's gradients, for all that it holds."""
    train, _ = split_shard(learner.job, learner.task, shard)
    [(_, total)] = model_sums(learner, learner_start(learner), {"c": train}, quiet(learner.job), 1)
    return flat(total)


def trained_head(learner: Learner, shard: Shard) -> Vector:
    """What a client's head moved by in one step of rate 1."""
    train, validation = split_shard(learner.job, learner.task, shard)
    loaded = {"c": LoadedShard(train, validation, learner.features.for_training(train))}
    head, job = learner_start(learner), learner.job
    work = LocalWork(
        learner, LoadedClients(loaded, "cpu"), ClientStateStore(), SecureAggregationSession(), quiet(job)
    )
    request = TrainRequest(job.canonical, job.hash, 1, learner.data_info, head)
    [update] = updates_of(work, request)
    return -flat(update.delta)


_starts: dict[int, tuple[Learner, Any]] = {}


def learner_start(learner: Learner) -> Any:
    """The tensors before the first round, the same every time."""
    if id(learner) not in _starts:
        _starts[id(learner)] = (learner, learner.initial())
    return _starts[id(learner)][1]


def flat(tensors: Any) -> Vector:
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)]).numpy()


def pairs(shard: Shard) -> Iterator[tuple[str, Shard, Shard]]:
    """(what comes, data without it, data with it)."""
    last = len(shard) - 1
    for name, place in (("the first", 0), ("one in the middle", last // 2), ("the last", last)):
        yield name, shard.select([row for row in range(len(shard)) if row != place]), shard
    for name, place in (("the first again", 0), ("one in the middle again", last // 2)):
        yield name, shard, shard.select(sorted([*range(len(shard)), place]))


def moved(learner: Learner, shard: Shard, total: Any = summed) -> dict[str, float]:
    """By how many clipping norms the sum moves, for each kind of neighbour."""
    return {
        name: float(np.linalg.norm(total(learner, more) - total(learner, less))) / C
        for name, less, more in pairs(shard)
    }


def check_moved(learner: Learner, shard: Shard, total: Any = summed) -> None:
    """Raises Detected where the sum moves by more than the clipping norm, or never moves."""
    found = moved(learner, shard, total)
    if max(found.values()) > 1 + 1e-6:
        raise Detected(f"one example moves the sum by so many clipping norms: {found}")
    assert max(found.values()) > 0.01, "nothing was measured"
