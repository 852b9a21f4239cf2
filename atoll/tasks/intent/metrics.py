"""Commands that are understood in full, and slots as spans of BIO tags, scored as conlleval does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torchmetrics import Metric

IGNORED = -100


class SlotF1(Metric):
    """Micro F1 of spans: one counts as found if its slot, its first and its last word are right.

    `tags` are the names behind the ids, such as "O", "B-city", "I-city". Without any span, true or
    predicted, it is undefined (NaN).
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
        """Count the spans of tag ids [n, t], or of scores [n, t, tags]; targets of -100 are cut out."""
        if predictions.ndim == 3:
            predictions = predictions.argmax(dim=2)
        for found, wanted in zip(predictions, targets, strict=True):
            real = wanted != IGNORED
            ours, theirs = (set(spans(self._named(ids[real]))) for ids in (found, wanted))
            self.matched += len(ours & theirs)
            self.predicted += len(ours)
            self.expected += len(theirs)

    def compute(self) -> torch.Tensor:
        return 2 * self.matched.to(torch.float64) / (self.predicted + self.expected)

    def _named(self, ids: torch.Tensor) -> list[str]:
        return [self.tags[i] for i in ids.tolist()]


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(slot, first, last) of each span; an I- that continues nothing begins one, as in conlleval.

    >>> list(spans(["B-city", "I-city", "O", "I-day", "B-day"]))
    [('city', 0, 1), ('day', 3, 3), ('day', 4, 4)]
    """
    start, slot = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if slot and (mark != "I" or name != slot):
            yield slot, start, place - 1
            slot = ""
        if not slot and mark != "O":
            start, slot = place, name


class IntentAccuracy(Metric):
    """The share of sentences whose intent is right."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: torch.Tensor
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count the first number of each row."""
        self.right += (predictions[:, 0] == targets[:, 0]).sum()
        self.total += len(targets)

    def compute(self) -> torch.Tensor:
        return self.right.to(torch.float64) / self.total


class CommandSlotF1(SlotF1):
    """Micro F1 of the spans of slots."""

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count the numbers behind the first of each row."""
        super().update(predictions[:, 1:], targets[:, 1:])
