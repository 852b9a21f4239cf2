"""Precision, recall and F1 of entities, equal to seqeval's default mode, which is conlleval's.

Entities are spans of tags, as found by `get_entities` of seqeval (Nakayama 2018,
https://github.com/chakki-works/seqeval).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torchmetrics import Metric

from atoll.tasks.mean_metric import Mean

IGNORED = -100
OUTSIDE = "O"
UNREAD = -1
"""The predicted tag of a word that the network hasn't read."""

MARKS = ("B", "I", "E", "S")
"""Begin, inside, end, single: the part of a tag before the `-` and the entity's name."""


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(name, index of the first word, index of the last word) of each entity in BIO, BIOES or IO tags.

    An I- or E- tag that continues no span begins one. A tag without a mark counts as I-; the name of a tag
    without a name is "_".

    >>> list(spans(["B-city", "I-city", "O", "I-day", "B-day"]))
    [('city', 0, 1), ('day', 3, 3), ('day', 4, 4)]
    >>> list(spans(["B-city", "E-city", "I-city", "S-city", "day", "day"]))
    [('city', 0, 1), ('city', 2, 2), ('city', 3, 3), ('day', 4, 5)]
    """
    start, before = 0, ("O", "")
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, name = mark_and_name(tag)
        continues = mark in ("I", "E") and before[0] in ("B", "I") and name == before[1]
        if before[0] != "O" and not continues:
            yield before[1], start, place - 1
        if not continues:
            start = place
        before = mark, name


def mark_and_name(tag: str) -> tuple[str, str]:
    """A tag's mark (O, B, I, E or S) and its entity's name.

    >>> mark_and_name("B-city"), mark_and_name("city"), mark_and_name("O"), mark_and_name("I")
    (('B', 'city'), ('I', 'city'), ('O', ''), ('I', '_'))
    """
    if tag == OUTSIDE:
        return "O", ""
    mark, dash, name = tag.partition("-")
    if mark in MARKS and (dash or not name):
        return mark, name or "_"
    return "I", tag


class EntityMetric(Metric):
    """Counts predicted spans, true spans, and matches, which are equal in name, first and last word.

    `tags` are the tags by id, such as "O", "B-city", "I-city".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    matched: torch.Tensor
    predicted: torch.Tensor
    expected: torch.Tensor

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__()
        self.tags = tuple(tags)
        for name in ("matched", "predicted", "expected"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count spans in predicted tag ids [n, t] or scores [n, t, tags], and in true tag ids [n, t].

        Places with the target -100 are removed. A prediction of -1 (a word that wasn't read) counts as O.
        """
        if predictions.ndim == 3:
            predictions = predictions.argmax(dim=2)
        for predicted, wanted in zip(predictions, targets, strict=True):
            real = wanted != IGNORED
            ours, theirs = (set(spans(self._named(ids[real]))) for ids in (predicted, wanted))
            self.matched += len(ours & theirs)
            self.predicted += len(ours)
            self.expected += len(theirs)

    def _named(self, ids: torch.Tensor) -> list[str]:
        return [OUTSIDE if i == UNREAD else self.tags[i] for i in ids.tolist()]


class EntityPrecision(EntityMetric):
    """The share of predicted spans that are right; undefined (NaN) if none is predicted."""

    def compute(self) -> torch.Tensor:
        return self.matched.to(torch.float64) / self.predicted


class EntityRecall(EntityMetric):
    """The share of true spans that are predicted; undefined (NaN) if there is none."""

    def compute(self) -> torch.Tensor:
        return self.matched.to(torch.float64) / self.expected


class EntityF1(EntityMetric):
    """Micro F1 of spans; undefined (NaN) if no span is true or predicted."""

    def compute(self) -> torch.Tensor:
        return 2 * self.matched.to(torch.float64) / (self.predicted + self.expected)


class TagAccuracy(Mean):
    """The share of words whose tag is predicted rightly."""

    higher_is_better = True

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count words by tag ids, both [n, t]; targets of -100 are left out, predictions of -1 are wrong."""
        real = targets != IGNORED
        self.score += ((predictions == targets) & real).sum()
        self.total += real.sum()
