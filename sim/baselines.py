"""What a federated run is compared with: nothing learnt, every client alone, all data in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from client.heads import train_heads
from client.site import Held, heads_of
from client.train import train_model
from protocol.job import Job
from protocol.messages import Update
from protocol.tensors import Tensors
from server.result import Baselines
from server.rounds import Run
from sim.population import Population
from tasks.seam import Shard


@dataclass(frozen=True)
class Comparison:
    """Trains outside the federation, from the same first model, for as many passes over the data.

    A client that is in every cohort makes `rounds * train.epochs` passes; in expectation
    one makes that times cohort / clients, and so do these.
    """

    population: Population

    def __call__(self, run: Run) -> tuple[Baselines, list[str]]:
        asked = run.job.evaluate.baselines
        if run.test is None:
            return {}, ["baselines left out: the job holds no test data out"] if asked else []
        found: dict[str, Mapping[str, float]] = {}
        if "zero_shot" in asked:
            found["zero_shot"] = run.learner.compute(run.learner.evaluate(run.first_model, run.test))
        if "local_only" in asked:
            alone = trained(run, {n: self._train_part(run, n) for n in run.population})
            found["local_only"] = _mean([_measured(run, tensors) for tensors in alone.values()])
        if "pooled" in asked:
            everything = joined([self._train_part(run, name) for name in run.population])
            found["pooled"] = _measured(run, trained(run, {"pooled": everything})["pooled"])
        return found, []

    def _train_part(self, run: Run, client: str) -> Shard:
        shard = run.learner.task.shard(self.population.dataset(run.job, client), run.learner.facts)
        return run.learner.split(shard)[0]


def trained(run: Run, shards: Mapping[str, Shard]) -> dict[str, Tensors]:
    """Final tensors of each owner that trains alone on its shard."""
    job, learner, first = long_job(run.job), run.learner, run.first_model
    if job.trains_on_features:
        held = {name: Held(shard, shard, learner.training_features(shard)) for name, shard in shards.items()}
        updates: Sequence[Update] = train_heads(first, *heads_of(held, job.train.device), job, 0, {})
    else:
        updates = [
            train_model(learner, first, shard, job, client=name, round=0, plan={})
            for name, shard in shards.items()
        ]
    return {u.client: {n: first[n] + delta for n, delta in u.delta.items()} for u in updates}


def long_job(job: Job) -> Job:
    """The job with all its rounds' passes over the data in one."""
    federation = job.federation
    rate = federation.cohort_rate or (federation.cohort or federation.clients) / federation.clients
    passes = max(1, round(federation.rounds * job.train.epochs * rate))
    return job.model_copy(update={"train": job.train.model_copy(update={"epochs": passes})})


def joined(shards: list[Shard]) -> Shard:
    """All examples in one place, in canonical order."""
    inputs = [x for shard in shards for x in shard.inputs]
    keys = tuple(key for shard in shards for key in shard.keys)
    whole = Shard(inputs, torch.cat([shard.targets for shard in shards]), keys)
    return whole.select(sorted(range(len(keys)), key=keys.__getitem__))


def _measured(run: Run, tensors: Tensors) -> dict[str, float]:
    assert run.test is not None
    return run.learner.compute(run.learner.evaluate(tensors, run.test))


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
