"""Cox's negative log partial likelihood (Cox 1972, "Regression Models and Life-Tables")."""

from __future__ import annotations

import torch

ROWS = 512
"""The number of patients whose risk sets are computed at once: memory is this times the batch size."""


def cox_loss(scores: torch.Tensor, times: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
    """The negative log partial likelihood of a batch, a scalar; all arguments are [n], events 1 or 0.

        -1/n  sum over i with an event of  (score_i - log sum over j with t_j >= t_i of exp(score_j))

    Patients with equal times are in each other's risk sets (Breslow 1974). The sum is divided by the number n
    of all patients in the batch, also censored ones, as in FLamby's benchmark (Ogier du Terrail et al. 2022).
    A batch without an event has loss 0 and no gradient.
    """
    total = scores.new_zeros(())
    for start in range(0, len(scores), ROWS):
        rows = slice(start, start + ROWS)
        at_risk = times.unsqueeze(0) >= times[rows].unsqueeze(1)
        everyone = scores.unsqueeze(0).expand(at_risk.shape)
        sums = torch.logsumexp(everyone.masked_fill(~at_risk, -torch.inf), dim=1)
        total = total + (events[rows].to(scores.dtype) * (sums - scores[rows])).sum()
    return total / max(len(scores), 1)
