"""Harrell's concordance index, from counts of pairs within each client that add up over clients."""

from __future__ import annotations

import torch

from atoll.tasks.mean_metric import Mean

ROWS = 1024
"""The number of patients that are compared with all others at once."""


class ConcordanceIndex(Mean):
    """The share of comparable pairs in which the patient with the earlier event has the higher score.

    A pair (i, j) is comparable if i has the event and j doesn't have it by then: t_j > t_i, or t_j = t_i and
    j is censored. Equal scores count one half (Harrell et al. 1982; equal to lifelines' `concordance_index`
    of the negated scores). Each update forms the pairs among its own patients, so it must get all patients of
    a client; there are no pairs across clients. Undefined (NaN) without a comparable pair.
    """

    higher_is_better = True

    def update(self, scores: torch.Tensor, targets: torch.Tensor) -> None:
        """Count the pairs among patients with scores [n] and targets [n, 2]: the time, and 1 for an event.

        Raises:
            ValueError: the shapes don't fit.
        """
        if scores.ndim != 1 or targets.shape != (len(scores), 2):
            shapes = f"{list(scores.shape)} and {list(targets.shape)}"
            raise ValueError(f"expected scores [n] and targets [n, 2], found {shapes}")
        targets = targets.to(scores.device)
        times, events = targets[:, 0], targets[:, 1] > 0
        first = torch.nonzero(events)[:, 0]
        for start in range(0, len(first), ROWS):
            some = first[start : start + ROWS]
            own_times = times[some].unsqueeze(1)
            later = (times > own_times) | ((times == own_times) & ~events)
            above = (scores[some].unsqueeze(1) > scores) & later
            equal = (scores[some].unsqueeze(1) == scores) & later
            self.score += above.sum().to(self.score) + equal.sum().to(self.score) / 2
            self.total += later.sum().to(self.total)
