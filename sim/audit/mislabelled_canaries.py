"""Canary examples for any model: examples of the clients' own, under a wrong label, or left out.

The weaker attack, for models whose gradients have no closed form: a wrong label is learnt only by
heart, so that a model that knows it has seen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.heads.layers import LOSSES
from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.learning.learner import Learner
from atoll.privacy.auditing.epsilon_bounds import Membership, Vector
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.run_state import Run
from atoll.server.transport import Transport
from atoll.sim.audit.example_canaries import carrier_with, owners
from atoll.sim.audit.replay import RoundTranscript
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.assignment import Rows
from atoll.sim.population.population import Population, number_of

MIN_ORDINARY_EXAMPLES = 2
"""Examples of a client that are never canaries: it must have something to train on without them."""


@dataclass(frozen=True)
class Mislabelled:
    """Rows of the whole training data [canaries], and the targets they have as canaries."""

    population: Population
    learner: Learner
    rows: NDArray[np.int64]
    targets: torch.Tensor

    @classmethod
    def of(cls, population: Population, learner: Learner, count: int) -> Mislabelled:
        """At the clients that train most often; each under the label of another class."""
        rows = candidates(population, learner)[:count]
        whole = population.whole(learner)
        generator = np.random.default_rng(stream_seed(learner.job.seed, "audit", "labels"))
        classes = len(learner.data_info.get("classes", ()))
        if learner.task.head_loss != "softmax" or classes < 2:
            raise ConfigError(f"task.name: {learner.job.task.name} has no classes to mislabel, expected two")
        shift = torch.from_numpy(generator.integers(1, classes, len(rows)))
        return cls(population, learner, rows, (whole.table[torch.from_numpy(rows)] + shift) % classes)

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def what(self) -> str:
        return "canary examples under wrong labels"

    def names(self, inside: Membership) -> list[str]:
        return []

    def carrier(self, inside: Membership) -> Transport:
        return carrier_with(
            self.population,
            lambda learner: MislabelledIndex(self.population, learner, canaries=self, inside=inside),
        )

    def joined(self, run: Run, updates: Sequence[Update], present: Sequence[str]) -> Sequence[Update]:
        return updates

    @property
    def scores_are_sums(self) -> bool:
        return False

    def scores(self, seen: RoundTranscript, inside: Membership) -> Vector:
        """How much less the round's model is surprised by the wrong label than the first one was."""
        return self._first - self._losses(seen.after)

    @cached_property
    def _first(self) -> Vector:
        return self._losses(self.learner.initial())

    def _losses(self, model: Tensors) -> Vector:
        loss = LOSSES[self.learner.task.head_loss]
        outputs = self.learner.outputs(model, self._shard).clone().unsqueeze(0)
        _, number = loss.grad(outputs, self.targets.unsqueeze(0))
        losses: Vector = loss.value(number)[0].to(torch.float64).numpy()
        return losses

    @cached_property
    def _shard(self) -> Shard:
        return self.population.whole(self.learner).select(self.rows.tolist())


def candidates(population: Population, learner: Learner) -> NDArray[np.int64]:
    """Training rows that one busy client alone holds, in a random order, but for a few of each client."""
    index = PopulationIndex(population, learner)
    parts = [train for train, _ in index.splits([number_of(name) for name in owners(learner.job)])]
    everybody = [train for train, _ in index.splits(range(learner.job.federation.clients))]
    rows, times = np.unique(np.concatenate(everybody), return_counts=True)
    single = set(rows[times == 1].tolist())
    places = [row for part in parts for row in part[MIN_ORDINARY_EXAMPLES:].tolist() if row in single]
    generator = np.random.default_rng(stream_seed(learner.job.seed, "audit", "candidates"))
    return generator.permutation(np.array(places, dtype=np.int64))


@dataclass(frozen=True)
class MislabelledIndex(PopulationIndex):
    """The population where canaries have their wrong labels, or are nobody's if they are out."""

    canaries: Mislabelled = field(kw_only=True)
    inside: Membership = field(kw_only=True)

    @cached_property
    def full_population(self) -> Shard:
        plain = self.population.whole(self.learner)
        targets = plain.table.clone()
        targets[torch.from_numpy(self.canaries.rows)] = self.canaries.targets
        return Shard(plain.inputs, targets, plain.keys, plain.groups)

    def splits(self, clients: Sequence[int]) -> list[tuple[Rows, Rows]]:
        out = self.canaries.rows[~self.inside]
        return [(t[~np.isin(t, out)], v) for t, v in super().splits(clients)]
