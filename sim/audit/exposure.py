"""How exposed secrets in a client's texts are: canaries in its training data, ranked by their likelihood.

Carlini et al. 2019, "The Secret Sharer". A canary is a sentence around a secret, drawn at random from all
secrets of a format. Its rank is its place among sentences around other secrets, the likeliest first, and its
exposure is how many bits of guessing the model saves: log2 of how many are ranked, less log2 of the rank
(definition 4). Ranked are not all secrets of the format but the canary and a random sample of the others, so
an exposure is at most log2 of the sample's size, and reads low for what is exposed more than that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from atoll.data.shard import Shard
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import PrivacySection
from atoll.learning.learner import WHOLE_BATCH, Learner
from atoll.privacy.auditing.epsilon_bounds import Membership, Vector
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.cohort import some_places
from atoll.server.rounds.run_state import Run
from atoll.server.transport import Transport
from atoll.sim.audit.example_canaries import carrier_with, owners
from atoll.sim.audit.replay import fresh_learner, job_to_replay, rounds_replayed
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.assignment import Rows
from atoll.sim.population.population import Population, number_of
from atoll.tasks.language_modeling.data import ASSISTANT, form_of
from atoll.tasks.language_modeling.task import LanguageModeling, has_target

ASKS, SAYS = "What is the code of box {box}?", "The code of box {box} is {secret}."
"""The format: what asks for a secret, where the data has prompts, and what tells it."""
DIGITS = 6
"""Of a secret: there are ten to that power."""
PLANTED, OTHERS = 4, 4
"""Boxes whose secret is planted, and as many for comparison whose secret no text tells."""
RANKED = 256
"""Secrets of each box that are ranked, its own among them."""


@dataclass(frozen=True)
class Boxes:
    """Secrets [boxes, RANKED] as numbers, drawn by the job's seed; the first of each box is its own."""

    secrets: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, seed: int) -> Boxes:
        space, boxes = 10**DIGITS, []
        for box in range(PLANTED + OTHERS):
            draw = stream(seed, "exposure", box)
            secret = int(torch.randint(space, (), generator=draw))
            others = some_places(space - 1, RANKED - 1, draw)
            boxes.append((secret, *(other + (other >= secret) for other in others)))
        return cls(tuple(boxes))

    def rows(self, form: Sequence[str], boxes: Sequence[int], *, is_own: bool) -> list[dict[str, Any]]:
        """Rows of a data set of that form: the secrets of these boxes in order, or their own alone."""
        return [
            row_of(form, box + 1, f"{secret:0{DIGITS}d}")
            for box in boxes
            for secret in self.secrets[box][: 1 if is_own else None]
        ]


def row_of(form: Sequence[str], box: int, secret: str) -> dict[str, Any]:
    """A text that tells a secret, in the columns of one of language modelling's forms."""
    asks, says = ASKS.format(box=box), SAYS.format(box=box, secret=secret)
    if form[0] == "messages":
        return {"messages": [{"role": "user", "content": asks}, {"role": ASSISTANT, "content": says}]}
    return {"text": says} if form[0] == "text" else {"prompt": asks, "completion": says}


@dataclass(frozen=True)
class PlantedTexts:
    """Texts of the secrets that are planted, each so many times, behind one client's training examples."""

    population: Population
    texts: Shard
    client: str

    def names(self, inside: Membership) -> list[str]:
        return []

    def carrier(self, inside: Membership) -> Transport:
        return carrier_with(
            self.population, lambda learner: PlantedIndex(self.population, learner, planted=self)
        )

    def joined(self, run: Run, updates: Sequence[Update], present: Sequence[str]) -> Sequence[Update]:
        return updates


@dataclass(frozen=True)
class PlantedIndex(PopulationIndex):
    """The population with the planted texts behind its examples."""

    planted: PlantedTexts = field(kw_only=True)

    @cached_property
    def full_population(self) -> Shard:
        plain, more = self.population.whole(self.learner), self.planted.texts
        groups = (*plain.groups, *(("",) * len(more))) if plain.groups else ()
        return Shard(
            (*plain.inputs, *more.inputs),
            torch.cat([plain.table, more.table]),
            plain.keys + more.keys,
            groups,
        )

    def splits(self, clients: Sequence[int]) -> list[tuple[Rows, Rows]]:
        planted_rows = np.arange(len(self.full_population))[-len(self.planted.texts) :]
        holder = number_of(self.planted.client)
        splits = zip(clients, super().splits(clients), strict=True)
        return [(np.append(t, planted_rows) if client == holder else t, v) for client, (t, v) in splits]


def exposed(
    job: Job, population: Population, times: int, watch: Callable[[int, int], None]
) -> dict[str, Any] | None:
    """Exposures in bits of secrets that were planted `times` times at one client, and of others.

    Before training, after the job's training, and, where the job promises privacy, after the same training
    without it. `watch` is told how many rounds are played, of how many. None where there are no texts to
    plant secrets in: of another task, where clients keep a part of the model, or with `times` 0.

    Raises:
        ConfigError: the job can't be played again with more texts, or they are too long for it.
    """
    if not times or job.task.name != "language-modeling" or job.personal.splits:
        return None
    jobs = {"after": job_to_replay(job)}
    if job.privacy.units:
        jobs["unprotected"] = job_to_replay(job.model_copy(update={"privacy": PrivacySection()}))
    learner = fresh_learner(job, population)
    boxes, form = Boxes.of(job.seed), form_of(population.train)
    ranked = partial(
        exposures, learner, told_in(learner, boxes.rows(form, range(len(boxes.secrets)), is_own=False))
    )
    findings: dict[str, Any] = {"before": ranked(learner.initial())}
    planted = [row for row in boxes.rows(form, range(PLANTED), is_own=True) for _ in range(times)]
    texts = PlantedTexts(population, told_in(learner, planted), owners(job)[0])
    for number, (when, played) in enumerate(jobs.items()):
        findings[when] = ranked(_trained(played, population, texts, len(jobs), number, watch))
    return {
        "format": SAYS.format(box="BOX", secret="SECRET"),
        "secrets": 10**DIGITS,
        "ranked": RANKED,
        "at_most": math.log2(RANKED),
        "expected": expected_of_unknown(RANKED),
        "times": times,
        "client": texts.client,
        "unprotected": None,
    } | findings


def told_in(learner: Learner, rows: Sequence[dict[str, Any]]) -> Shard:
    """The rows as examples, in their order, each with a key of its own.

    Raises:
        ConfigError: one of them is longer than the job's examples may be.
    """
    task = learner.task
    assert isinstance(task, LanguageModeling)
    dataset = task.schema.adopted({"train": pa.Table.from_pylist(list(rows))}).train
    tokens = task.tokens(dataset)
    if any(one.is_cut for one in tokens):
        raise ConfigError(
            f"task.options.max_tokens: {task.options.max_tokens}, too few for the texts that tell a secret;"
            " expected more, or --planted 0"
        )
    keys = [b"%08d" % n + hashlib.sha256(b"planted %d" % n).digest()[8:] for n in range(len(rows))]
    return task.shard_of(tokens, keys)


def _trained(
    job: Job,
    population: Population,
    texts: PlantedTexts,
    runs: int,
    run: int,
    watch: Callable[[int, int], None],
) -> Tensors:
    """The model after all rounds, of the so-many-th of some runs."""
    rounds, model = job.federation.rounds, {}
    for done, seen in enumerate(rounds_replayed(job, population, texts, np.ones(0, dtype=bool)), start=1):
        model = seen.after
        watch(run * rounds + done, runs * rounds)
    return model


def exposures(learner: Learner, ranked: Shard, tensors: Tensors) -> dict[str, list[float]]:
    """Bits for each box whose secret was planted, and for each of the others."""
    surprise = surprises(learner, ranked, tensors).reshape(-1, RANKED)
    bits = [exposure(line) for line in surprise]
    return {"planted": bits[:PLANTED], "others": bits[PLANTED:]}


def surprises(learner: Learner, shard: Shard, tensors: Tensors) -> Vector:
    """-log of the probability of each example's learnt tokens together, [examples]."""
    model, losses = learner.filled(tensors), []
    with torch.inference_mode():
        for start in range(0, len(shard), WHOLE_BATCH):
            rows = range(start, min(start + WHOLE_BATCH, len(shard)))
            surprise = model(learner.on_device(learner.collate(shard, rows))).to(torch.float64).cpu()
            losses.append((surprise * has_target(surprise, shard.targets_of(rows))).sum(1))
    return torch.cat(losses).numpy()


def exposure(surprise: Vector) -> float:
    """Bits of the first of some texts: log2 of how many there are, less log2 of its rank by likelihood.

    A text that is as likely as the first counts as likelier.

    >>> exposure(np.array([1.0, 2.0, 0.5, 9.0])), exposure(np.ones(4))  # the second of four, the last of four
    (1.0, 0.0)
    """
    return math.log2(len(surprise)) - math.log2(int((surprise <= surprise[0]).sum()))


def expected_of_unknown(count: int) -> float:
    """The mean exposure of a secret that the model knows nothing of: each rank up to `count` alike.

    It grows towards 1 / ln 2 = 1.44 bits with the count.

    >>> round(expected_of_unknown(2), 9)  # 1 bit or none
    0.5
    """
    return math.log2(count) - math.lgamma(count + 1) / (count * math.log(2))
