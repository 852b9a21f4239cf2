"""The round that forms a head in closed form: statistics are looked at, added up, and made a head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from atoll.job.closed_form import RIDGE, statistics_shapes
from atoll.job.job import Job
from atoll.learning.learner import sum_states
from atoll.protocol.messages import Failure, Measurement, Reply
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.validation import MAX_EXAMPLES, ValidatedUpdates
from atoll.strategies.closed_form import head_of

Form = dict[str, tuple[int, ...]]


def validate_statistics(
    replies: Iterable[Reply], cohort: Sequence[str], job: Job, model: Tensors
) -> ValidatedUpdates:
    """Sort the replies into usable statistics, which come out added up by client name, and set aside."""
    classes, width = model["head.weight"].shape
    form = statistics_shapes(job, classes, width)
    good: dict[str, Tensors] = {}
    aside: dict[str, str] = {}
    for reply in replies:
        fault = _fault(reply, cohort, form)
        if fault is not None:
            aside[reply.client] = fault
        elif reply.client in good:
            aside[f"{reply.client} (again)"] = "duplicate reply; the first one counts"
        else:
            assert isinstance(reply, Measurement)
            good[reply.client] = reply.states
    for name in cohort:
        if name not in good and name not in aside:
            aside[name] = "no reply before the deadline"
    total = sum_states(good[name] for name in sorted(good))
    return ValidatedUpdates((), dict(sorted(aside.items())), num_clients=len(good), statistics=total)


def _fault(reply: Reply, cohort: Sequence[str], form: Form) -> str | None:
    if reply.client not in cohort:
        return "not in this round's cohort"
    if isinstance(reply, Failure):
        return reply.reason
    if not isinstance(reply, Measurement) or reply.round != 1:
        return f"sent {type(reply).__name__} of round {reply.round}, expected statistics of round 1"
    found = {name: tuple(t.shape) for name, t in reply.states.items() if t.dtype == torch.float64}
    if found != form:
        return f"statistics: expected {form} in float64, found {found}"
    if not all(bool(torch.isfinite(t).all()) for t in reply.states.values()):
        return "statistics that are not finite"
    counts = reply.states["counts"]
    if bool((counts < 0).any()) or not 0 < float(counts.sum()) <= MAX_EXAMPLES:
        return f"statistics of {float(counts.sum()):g} examples, expected 1 to {MAX_EXAMPLES}"
    return None


def solve_head(job: Job, total: Tensors) -> Tensors:
    """The head that statistics make."""
    kind, ridge = job.tune.head_init, job.tune.ridge
    assert kind is not None
    return head_of(kind, total, RIDGE if ridge is None else ridge)


def statistics_size(job: Job, model: Tensors) -> int:
    """Bytes of one client's statistics as they travel."""
    classes, width = model["head.weight"].shape
    numbers = (int(torch.Size(shape).numel()) for shape in statistics_shapes(job, classes, width).values())
    return 8 * sum(numbers)
