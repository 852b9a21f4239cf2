"""Canary examples for heads: a feature vector in a direction of its own, with a label of its own.

In the closed form of a head's gradient an example is its features times the loss's derivative. Features
that point where the data hardly does, long enough for the gradient to be clipped, so make the canary's
clipped gradient a vector that the attacker knows, and that hardly anything else contributes to ("gradient
canaries", Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.client.dp.example_draws import example_numbers
from atoll.client.heads.feature_table import ClientRows, FeatureTable
from atoll.client.heads.layers import LOSSES, Layers
from atoll.job.job import Job
from atoll.job.privacy import cohort_is_secret, uses_secure_aggregation
from atoll.learning.learner import Learner
from atoll.privacy.auditing.epsilon_bounds import Membership, Vector
from atoll.privacy.dp_plan import dp_plan_of
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.cohort import sample
from atoll.server.rounds.run_state import Run
from atoll.server.transport import Transport
from atoll.sim.audit.replay import NoLedgers, RoundTranscript
from atoll.sim.engines.inline import InlineTransport
from atoll.sim.engines.simulated_site import PopulationIndex, SimulatedSite
from atoll.sim.population.population import Population, client_names

SAMPLED = 4096
"""Examples from which the directions of the data are learnt."""
LONG, SHORT = 16.0, 4.0
"""A canary's features, times the clipping norm: the longer, the less of its gradient is in the bias,
which all canaries share, but the more of the head's noise is in its outputs, until no gradient is left."""
OUTPUT_DEVIATION = 2.0
"""What that noise may be in a canary's outputs, if its features are neither too long nor too short."""
NO_SHARE = 1e-9
"""Of the features' squares: a direction with less of them has none but for rounding."""
BUSY_PART = 0.8
"""A client takes canaries if it trains in at least this part of the rounds that the busiest one does."""


@dataclass
class CanarySite(SimulatedSite):
    """All simulated clients, with another look at the population: one with canaries."""

    index_factory: Callable[[Learner], PopulationIndex] = field(kw_only=True)

    def index(self, learner: Learner) -> PopulationIndex:
        if id(learner) not in self._index:
            self._index = {id(learner): self.index_factory(learner)}
        return self._index[id(learner)]


def carrier_with(population: Population, look: Callable[[Learner], PopulationIndex]) -> Transport:
    """To all clients of a population that is looked at that way."""
    site = CanarySite(population, ledgers=NoLedgers(Path()), population=population, index_factory=look)
    return InlineTransport(population, site)


def owners(job: Job) -> list[str]:
    """The clients that train most often, which lose most: who those are is known from the job."""
    everybody = client_names(job.federation.clients)
    if cohort_is_secret(job):
        return list(everybody)
    rounds = range(1, job.federation.rounds + 1)
    times = Counter(name for round in rounds for name in sample(everybody, job, round))
    most = max(times.values(), default=0)
    return sorted(name for name, count in times.items() if count >= BUSY_PART * most)


@dataclass(frozen=True)
class CanaryFeatures:
    """So many canaries as features [canaries, width] and targets, each at one client."""

    population: Population
    learner: Learner
    features: torch.Tensor
    targets: torch.Tensor
    owner: NDArray[np.str_]

    @classmethod
    def of(cls, population: Population, learner: Learner, count: int) -> CanaryFeatures:
        """Dealt to the clients that train most often; two at one client differ in direction or label."""
        job, free = learner.job, free_directions(population, learner)
        holders = owners(job)
        place = np.arange(count) if uses_secure_aggregation(job) else np.arange(count) // len(holders)
        classes = len(learner.data_info.get("classes", ())) or 1
        generator = np.random.default_rng(stream_seed(job.seed, "audit", "examples"))
        shift = generator.integers(0, classes, len(free))
        direction = place % len(free)
        label = (place // len(free) + shift[direction]) % classes
        targets = _targets(population, learner, label)
        features = free[torch.from_numpy(direction)] * _length(population, learner)
        owner = np.array(holders)[np.arange(count) % len(holders)]
        return cls(population, learner, features, targets, owner)

    @classmethod
    def most(cls, population: Population, learner: Learner) -> int:
        """How many there can be, so that no two that are seen together are the same."""
        classes = len(learner.data_info.get("classes", ()))
        together = classes * len(free_directions(population, learner))
        return together * (1 if uses_secure_aggregation(learner.job) else len(owners(learner.job)))

    @property
    def count(self) -> int:
        return len(self.targets)

    @property
    def what(self) -> str:
        return "canary examples whose features point where the data hardly does"

    def names(self, inside: Membership) -> list[str]:
        return []

    def carrier(self, inside: Membership) -> Transport:
        return carrier_with(
            self.population,
            lambda learner: FeatureIndex(self.population, learner, canaries=self, inside=inside),
        )

    def joined(self, run: Run, updates: Sequence[Update], present: Sequence[str]) -> Sequence[Update]:
        return updates

    @property
    def scores_are_sums(self) -> bool:
        """Private local training is by plain SGD, so that an update is a sum of its noised steps."""
        return dp_plan_of(self.learner.job, "example") is not None

    def scores(self, seen: RoundTranscript, inside: Membership) -> Vector:
        """How far what the server got went against each canary's gradient at the model that was sent.

        Where it gets single updates, that is the update of the canary's own client. Only the weights on
        the features count: biases and later layers move with all examples, and would drown the canary.
        What the other canaries do to the update on average is taken off first. Those with the same
        features and another label would else pull the head back to where their gradients cancel.
        """
        scores = np.zeros(self.count)
        first = Layers.of(seen.load_before).layers[0]
        errors = self._errors(seen.load_before)[:, : first.outputs]
        for update in seen.updates:
            rows = self._rows_of(update.client)
            moved = update.delta[first.weight].to(torch.float32)
            present = torch.from_numpy(inside)[rows]
            along = self._along(errors[rows], self.features[rows], moved, present)
            scores[rows.numpy()] = -along.to(torch.float64).numpy()
        return scores

    def _along(
        self, errors: torch.Tensor, features: torch.Tensor, moved: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """The move along each canary's gradient, less the expected part of the others that are present."""
        length = self._expected_length
        all_present = length * (errors[present].T @ features[present])
        score = length * present * errors.square().sum(1) * features.square().sum(1)
        return ((errors @ (moved + all_present)) * features).sum(1) - score

    @cached_property
    def _expected_length(self) -> float:
        """By how much a canary that is in moves an update on average, if it is clipped; 0 if nothing is."""
        dp_plan = dp_plan_of(self.learner.job, "example")
        if dp_plan is None:
            return 0.0
        steps = dp_plan.per_round * dp_plan.event.sampling_rate
        return self.learner.job.train.lr * steps * dp_plan.promise.clipping_norm / dp_plan.divisor

    def _errors(self, head: Tensors) -> torch.Tensor:
        """The loss's derivative in the first layer's outputs, over the gradient's length, [canaries, …]."""
        layers = Layers.of(head)
        stack = layers.stack(head, "cpu")
        values = layers.forward(stack, self._examples.features.unsqueeze(0))
        loss = LOSSES[self.learner.task.head_loss]
        error, _ = loss.grad(values[-1].clone(), self._examples.targets.unsqueeze(0))
        first = layers.output_gradients(stack, values, error)[0][0]
        length = first.norm(dim=1) * self.features.norm(dim=1)
        scaled: torch.Tensor = first / length.clamp_min(1e-12).unsqueeze(1)
        return scaled

    def _rows_of(self, client: str) -> torch.Tensor:
        """The canaries that an update may hold: the client's own, or all where it stands for everybody."""
        if uses_secure_aggregation(self.learner.job):
            return torch.arange(self.count)
        return torch.from_numpy(np.flatnonzero(self.owner == client))

    @cached_property
    def _examples(self) -> FeatureTable:
        return FeatureTable.of(self.features, self.targets)


@dataclass(frozen=True)
class FeatureIndex(PopulationIndex):
    """The population with the canaries that are inside behind its examples."""

    canaries: CanaryFeatures = field(kw_only=True)
    inside: Membership = field(kw_only=True)
    _tables: dict[int, tuple[FeatureTable, FeatureTable]] = field(default_factory=dict)

    def client_rows(self, names: Sequence[str]) -> tuple[FeatureTable, list[ClientRows]]:
        """As without canaries, but for the rows that each client has more."""
        examples, client_rows = super().client_rows(names)
        first = examples.count
        return self._longer(examples), [self._with_canaries(work, first) for work in client_rows]

    def _with_canaries(self, work: ClientRows, first: int) -> ClientRows:
        canaries = self._canaries_of(work.client)
        rows = np.concatenate([work.rows, first + canaries])
        if work.numbers is None:
            return ClientRows(work.client, rows)
        drawn_by = example_numbers([int(place).to_bytes(32, "little") for place in canaries])
        return ClientRows(work.client, rows, np.concatenate([work.numbers, drawn_by]))

    def _canaries_of(self, client: str) -> NDArray[np.int64]:
        return np.flatnonzero(self.inside & (self.canaries.owner == client))

    def _longer(self, examples: FeatureTable) -> FeatureTable:
        """The table with the canaries behind every view's examples; the last one is kept."""
        if id(examples) not in self._tables:
            new = self.canaries._examples
            parts: list[torch.Tensor] = []
            targets: list[torch.Tensor] = []
            for view in range(examples.views):
                rows = slice(view * examples.count, (view + 1) * examples.count)
                parts += [examples.features[rows], new.features.to(examples.features.device)]
                targets += [examples.targets[rows], new.targets.to(examples.targets.device)]
            self._tables.clear()
            self._tables[id(examples)] = (
                examples,
                FeatureTable(torch.cat(parts), torch.cat(targets), examples.views),
            )
        return self._tables[id(examples)][1]


def free_directions(population: Population, learner: Learner) -> torch.Tensor:
    """Orthonormal directions of features [some, width] in which the data is least: half, or all with none."""
    features = _some_features(population, learner).to(torch.float64)
    squares, vectors = torch.linalg.eigh(features.T @ features)  # the smallest eigenvalues come first
    empty = int((squares <= NO_SHARE * squares.sum()).sum())
    free: torch.Tensor = vectors[:, : max(empty, learner.features.width - learner.features.width // 2)]
    return free.T.to(torch.float32).contiguous()


def _some_features(population: Population, learner: Learner) -> torch.Tensor:
    whole = population.whole(learner)
    generator = np.random.default_rng(stream_seed(learner.job.seed, "audit", "features"))
    rows = generator.permutation(len(whole))[:SAMPLED]
    return learner.features.for_training(whole.select(sorted(rows.tolist())))[0]


def _length(population: Population, learner: Learner) -> float:
    """Of a canary's features: as the data's, or under a promise so that its gradient is clipped."""
    dp_plan = dp_plan_of(learner.job, "example")
    if dp_plan is None:
        return float(_some_features(population, learner).norm(dim=1).median())
    norm = dp_plan.promise.clipping_norm
    noise = (
        learner.job.train.lr * dp_plan.noise_multiplier * norm / dp_plan.divisor * math.sqrt(dp_plan.releases)
    )
    return min(max(OUTPUT_DEVIATION / noise, SHORT * max(1.0, norm)), LONG * max(1.0, norm))


def _targets(population: Population, learner: Learner, label: Iterable[int]) -> torch.Tensor:
    """Targets of the canaries: classes, or where there are none, targets of examples drawn at random."""
    if learner.task.head_loss == "softmax":
        return torch.tensor(list(label), dtype=torch.int64)
    whole = population.whole(learner)
    generator = np.random.default_rng(stream_seed(learner.job.seed, "audit", "targets"))
    return whole.table[torch.from_numpy(generator.integers(0, len(whole), len(list(label))))]
