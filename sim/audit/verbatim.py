"""How many texts of clients a language model completes word for word: extraction with the right beginning.

Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models", definition 3.1: a string is
extractable with k tokens of context if the model, given those k tokens, greedily writes the rest of the
string. Here k is 20, and the next 20 tokens must come out. As long as they do, the model has seen what it
would have written itself, so one pass over the true text tells: each token must be the likeliest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from atoll.data.shard import Shard
from atoll.job.job import Job
from atoll.learning.learner import WHOLE_BATCH, Learner
from atoll.protocol.random_streams import stream
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.cohort import some_places
from atoll.sim.audit.replay import fresh_learner
from atoll.sim.engines.simulated_site import PopulationIndex
from atoll.sim.population.population import Population, number_of

GIVEN, WRITTEN = 20, 20
"""Tokens of a text that are given, and that must follow."""
MOST_TEXTS = 500
"""Texts that are tried; more are drawn from by the job's seed."""


@dataclass(frozen=True)
class Passage:
    """A stretch of learnt tokens in one example of the population: whose it is, and where it begins."""

    client: str
    row: int
    begins: int
    """At which of the example's learnt tokens."""


def completed_verbatim(
    job: Job, population: Population, model: Callable[[], Tensors]
) -> dict[str, Any] | None:
    """Texts tried, and how many came out before training and after, in all and by client.

    `model` reads the trained model's tensors. None where nothing can be completed: of another task, where
    clients keep a part of the model, or where no text has so many learnt tokens in a row.
    """
    if job.task.name != "language-modeling" or job.personal.splits:
        return None
    job = job.stages[-1]
    learner = fresh_learner(job, population)
    index = PopulationIndex(population, learner)
    passages = passages_of(index, population.names(job))
    if not passages:
        return None
    if len(passages) > MOST_TEXTS:
        drawn = some_places(len(passages), MOST_TEXTS, stream(job.seed, "verbatim"))
        passages = [passages[place] for place in drawn]
    shard = index.full_population.select([passage.row for passage in passages])
    learner.keep_states(shard)
    hits = {
        when: came_out(learner, tensors, shard, passages)
        for when, tensors in (("before", learner.initial()), ("after", model()))
    }
    by_client = {
        name: {"texts": sum(p.client == name for p in passages)}
        | {when: _of(name, passages, came) for when, came in hits.items()}
        for name in sorted({passage.client for passage in passages})
    }
    return {
        "given_tokens": GIVEN,
        "written_tokens": WRITTEN,
        "texts": len(passages),
        **{when: sum(came) for when, came in hits.items()},
        "clients": by_client,
    }


def _of(name: str, passages: Sequence[Passage], came: Sequence[bool]) -> int:
    return sum(hit for passage, hit in zip(passages, came, strict=True) if passage.client == name)


def passages_of(index: PopulationIndex, names: Sequence[str]) -> list[Passage]:
    """The first long enough stretch of each training example, of every client in turn."""
    passages = []
    for name in names:
        [(rows, _)] = index.splits([number_of(name)])
        for row in rows.tolist():
            begins = first_stretch(index.full_population.inputs[row]["places"].tolist())
            if begins is not None:
                passages.append(Passage(name, row, begins))
    return passages


def first_stretch(places: Sequence[int]) -> int | None:
    """Where so many places in a row begin that a text can be given and completed; None: nowhere.

    >>> first_stretch([3, *range(10, 70)]), first_stretch(range(39))
    (1, None)
    """
    begin = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            if end - begin >= GIVEN + WRITTEN:
                return begin
            begin = end
    return None


def came_out(learner: Learner, tensors: Tensors, shard: Shard, passages: Sequence[Passage]) -> list[bool]:
    """Whether the model with these tensors completes each passage, which are the shard's rows in order."""
    came: list[bool] = []
    with torch.inference_mode():
        model = learner.filled(tensors)
        for start in range(0, len(shard), WHOLE_BATCH):
            rows = range(start, min(start + WHOLE_BATCH, len(shard)))
            batch = learner.on_device(learner.batch(shard, rows))
            is_likeliest = model.measure(batch)[0][:, :, 1] == 1
            for row, line in zip(rows, is_likeliest, strict=True):
                first = passages[row].begins + GIVEN
                came.append(bool(line[first : first + WRITTEN].all()))
    return came
