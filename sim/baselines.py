"""What a federated run is compared with: nothing learnt, every client alone, all data in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atoll.client.heads.distillation import head_loss
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.client.shard_cache import LoadedShard, feature_table
from atoll.client.training.local_sgd import train_model
from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.protocol.messages import Update
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.evaluation import evaluation_clients
from atoll.server.rounds.run_state import Run
from atoll.server.run.result import Baselines
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.population import Population, number_of
from atoll.tasks.metric_values import MetricValues, means


@dataclass(frozen=True)
class BaselineRunner:
    """Trains outside the federation, from the same first model, for as many passes over the data.

    A client that is in every cohort makes `rounds * train.epochs` passes, or `rounds * train.steps`
    steps; in expectation one makes that times cohort / clients, and so do these. The pooled data takes as
    many steps as all clients together. Of a large population the panel
    stands for all: the clients that measure the model.
    """

    population: Population

    def __call__(self, run: Run) -> tuple[Baselines, list[str]]:
        names = run.setup.job.evaluate.baselines
        if run.setup.test is None:
            return {}, ["baselines left out: the job holds no test data out"] if names else []
        panel = evaluation_clients(run)
        metrics: dict[str, MetricValues] = {}
        if "zero_shot" in names:
            metrics["zero_shot"] = _measured(run, run.state.initial_model)
        if not {"local_only", "pooled"} & set(names):
            return metrics, []
        index = PopulationIndex(self.population, run.state.learner)
        rows = [train for train, _ in index.splits([number_of(name) for name in panel])]
        if "local_only" in names:
            shards = (index.training_view.select(client_rows.tolist()) for client_rows in rows)
            alone = trained(run, dict(zip(panel, shards, strict=True)))
            measured = (_measured(run, tensors) for tensors in alone.values())
            metrics["local_only"] = {name: mean.value for name, mean in means(measured).items()}
        if "pooled" in names:
            everything = index.training_view.select(np.unique(np.concatenate(rows)).tolist())
            metrics["pooled"] = _measured(run, trained(run, {"pooled": everything}, of=len(panel))["pooled"])
        if len(panel) == len(run.setup.population):
            return metrics, []
        return metrics, [f"local_only and pooled are of {len(panel)} of {len(run.setup.population)} clients"]


def trained(run: Run, shards: Mapping[str, Shard], *, of: int = 1) -> dict[str, Tensors]:
    """Final tensors of each owner that trains alone on its shard, which is that `of` so many clients."""
    job, learner, first = centralized_job(run.setup.job, of), run.state.learner, run.state.initial_model
    if learner.trains_on_features:
        held = {
            name: LoadedShard(shard, shard, learner.features.for_training(shard))
            for name, shard in shards.items()
        }
        local = HeadTrainingConfig(job, head_loss(job, learner.task.head_loss), round=0)
        updates: Sequence[Update] = train_heads(first, *feature_table(held, job.train.device), local)
    else:
        learner.begin_round(0)
        updates = [
            train_model(learner, first, shard, job, client=name, round=0, plan={})
            for name, shard in shards.items()
        ]
    return {u.client: {**first, **{n: first[n] + d for n, d in u.delta.items()}} for u in updates}


def centralized_job(job: Job, clients: int = 1) -> Job:
    """The job with all its rounds' passes over the data, or all steps of so many clients, in one."""
    federation = job.federation
    rate = federation.cohort_rate or (federation.cohort or federation.clients) / federation.clients
    key, each = ("epochs", job.train.epochs)
    if job.train.steps is not None:
        key, each = "steps", job.train.steps * clients
    longer = {key: max(1, round(federation.rounds * each * rate))}
    return job.model_copy(update={"train": job.train.model_copy(update=longer)})


def _measured(run: Run, tensors: Tensors) -> MetricValues:
    assert run.setup.test is not None
    return run.state.learner.compute(run.state.learner.evaluate(tensors, run.setup.test))
