"""What a single update of a head gives away of the examples behind it: their labels and their features.

The gradient of a linear head under cross-entropy is (p - y) x' for one example, with p - y for the bias:
its only negative part is at the label, and that row of the weights points along the features (Zhao,
Mopuri, Bilen 2020, "iDLG"; Geiping et al. 2020, "Inverting Gradients"). With several
examples of different classes the rows still do, with the other examples mixed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.dp.dp_sgd import DpSgd
from atoll.client.dp.poisson import private_training
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES, Layers
from atoll.client.heads.train import HeadTrainingConfig, train_heads
from atoll.job.job import Job
from atoll.job.train import PLAIN_STEPS
from atoll.learning.learner import Learner
from atoll.privacy.central import CentralGaussian
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.noise import entropy
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.tensors import Tensors
from atoll.sim.audit.replay import job_to_replay
from atoll.sim.population.population import Population
from atoll.tasks import task_named

ALONE = 200
"""Examples that are probed one by one; as many, together, in batches."""
TOGETHER = 8
"""Examples of a batch, each of another class; fewer where there are no more classes than that."""


@dataclass(frozen=True)
class Probe:
    """A head, examples to be found out, and the job whose protection stands in between."""

    job: Job
    head: Tensors
    examples: FeatureTable
    features: torch.Tensor
    targets: torch.Tensor

    def attack_result(self, groups: Sequence[NDArray[np.int64]], *, is_protected: bool) -> dict[str, float]:
        """The part of the labels that is found, and the mean cosine of what is taken for the features.

        Each group of rows is the one batch of a client of its own, in a single step.
        """
        weight = Layers.of(self.head).layers[0].weight
        bias = weight.removesuffix("weight") + "bias"
        similarities: list[float] = []
        along: list[float] = []
        for rows, moved in zip(groups, self._moved(groups, is_protected), strict=True):
            towards = torch.topk(moved[bias], len(rows)).indices.tolist()
            labels = self.targets[torch.from_numpy(rows)].tolist()
            similarities += [float(label in towards) for label in labels]
            guessed = towards if len(rows) == 1 else labels
            pairs = zip(guessed, self.features[torch.from_numpy(rows)], strict=True)
            along += [_cosine(moved[weight][label], x) for label, x in pairs]
        return {"label": float(np.mean(similarities)), "cosine": float(np.mean(along))}

    def _moved(self, groups: Sequence[NDArray[np.int64]], is_protected: bool) -> list[Tensors]:
        """How the head moves in one step of each group, as the attacker sees it."""
        private = self._per_example(groups) if is_protected else None
        size = max(len(rows) for rows in groups)
        train = self.job.train.model_copy(
            update=PLAIN_STEPS
            | {
                "epochs": 1,
                "steps": None,
                "batch_size": size,
                "optimizer": "sgd",
                "momentum": 0.0,
                "weight_decay": 0.0,
            }
        )
        local = HeadTrainingConfig(
            self.job.model_copy(update={"train": train}), LOSSES["softmax"], 1, per_example=private
        )
        client_rows = [
            ClientRows(f"probe-{i}", rows, rows.astype(np.uint64)) for i, rows in enumerate(groups)
        ]
        updates = train_heads(self.head, self.examples, client_rows, local)
        if is_protected and private is None:
            return [self._released(update) for update in updates]
        return [update.delta for update in updates]

    def _per_example(self, groups: Sequence[NDArray[np.int64]]) -> DpSgd | None:
        """The job's own clipping and noise, on batches that hold just the group."""
        dp_plan = dp_plan_of(self.job, "example")
        if dp_plan is None:
            return None
        usual = private_training(self.job, dp_plan, 1, {})
        return replace(usual, draw=lambda client, numbers: [np.arange(len(numbers))])

    def _released(self, update: Update) -> Tensors:
        """What the noised sum of clients holds, for one who knows all the others' updates."""
        dp_plan = dp_plan_of(self.job, "client")
        assert dp_plan is not None
        mechanism = CentralGaussian(
            dp_plan.promise.clipping_norm, dp_plan.noise_multiplier, 1.0, 1.0, entropy
        )
        return mechanism.release([update], self.head)[0]


def probed(job: Job, population: Population) -> dict[str, Any] | None:
    """What updates give away without protection, and under the job's; None where heads aren't linear."""
    job = job_to_replay(job)
    task = task_named(job.task.name)
    learner = Learner.of(job, task, task.merge_info(population.roster(job).data_info))
    head = learner.initial()
    if not learner.trains_on_features or len(Layers.of(head).layers) != 1 or task.head_loss != "softmax":
        return None
    probe = _probe(job, population, learner, head)
    alone = [np.array([row]) for row in range(len(probe.targets))][:ALONE]
    together = _batches(probe.targets, len(learner.data_info["classes"]), job.seed)

    def attack_results(is_protected: bool) -> dict[str, Any]:
        batch = probe.attack_result(together, is_protected=is_protected) if together else None
        one = probe.attack_result(alone, is_protected=is_protected)
        return {"one": one, "batch": batch}

    size, classes = len(together[0]) if together else 0, len(learner.data_info["classes"])
    return {
        "batch_size": size,
        "chance": {"one": 1 / classes, "batch": size / classes},
        "unprotected": attack_results(False),
        "protected": attack_results(True) if job.privacy.units else None,
    }


def _probe(job: Job, population: Population, learner: Learner, head: Tensors) -> Probe:
    """On some of the training examples, drawn at random."""
    whole = population.whole(learner)
    rows = np.random.default_rng(stream_seed(job.seed, "audit", "probe")).permutation(len(whole))
    shard = whole.select(rows[: TOGETHER * ALONE].tolist())
    features = learner.features.for_training(shard)[0]
    return Probe(job, head, FeatureTable.of(features, shard.table), features, shard.table)


def _batches(targets: torch.Tensor, classes: int, seed: int) -> list[NDArray[np.int64]]:
    """Batches of examples of as many different classes, one fewer than there are, or eight."""
    size = min(TOGETHER, classes - 1)
    by_class = [np.flatnonzero(targets.numpy() == c).tolist() for c in range(classes)]
    generator = np.random.default_rng(stream_seed(seed, "audit", "batches"))
    batches: list[NDArray[np.int64]] = []
    while size > 1 and len(batches) < ALONE // TOGETHER:
        left = [c for c in generator.permutation(classes).tolist() if by_class[c]]
        if len(left) < size:
            break
        batches.append(np.array([by_class[c].pop() for c in left[:size]]))
    return batches


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.to(torch.float64), b.to(torch.float64), dim=0))
