"""The round that computes a head in closed form: it validates clients' statistics, sums them and solves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from atoll.job.closed_form import RIDGE, statistics_shapes
from atoll.job.job import Job
from atoll.learning.learner import sum_states
from atoll.privacy.dp_plan import dp_plan_of
from atoll.protocol.messages import CHARGED_ROUNDS, Failure, Measurement, Reply
from atoll.protocol.tensors import Tensors
from atoll.server.rounds.central_dp import CentralDp, NoProtection
from atoll.server.rounds.validation import MAX_EXAMPLES, ValidatedUpdates
from atoll.strategies.closed_form import head_of
from atoll.strategies.private_closed_form import SENSITIVITY, moment_shapes, noised_head
from atoll.strategies.random_features import last_layer

Form = dict[str, tuple[int, ...]]


def form_of_statistics(job: Job, model: Tensors) -> Form:
    """The shapes of the tensors that a client sends, by name; their dtype is float64."""
    classes, width = model[f"{last_layer(model)}.weight"].shape
    if not job.privacy.units:
        return statistics_shapes(job, classes, width)
    assert job.tune.head_init is not None
    shapes = moment_shapes(job.tune.head_init, classes, width)
    return shapes | {CHARGED_ROUNDS: ()} if "example" in job.privacy.units else shapes


def validate_statistics(
    replies: Iterable[Reply], cohort: Sequence[str], job: Job, model: Tensors
) -> ValidatedUpdates:
    """Sort the replies into usable statistics, summed in the order of client names, and set aside."""
    form = form_of_statistics(job, model)
    good: dict[str, Tensors] = {}
    aside: dict[str, str] = {}
    for reply in replies:
        fault = _fault(reply, cohort, form, job)
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
    return _validated({name: good[name] for name in sorted(good)}, dict(sorted(aside.items())), job)


def _validated(good: Mapping[str, Tensors], aside: dict[str, str], job: Job) -> ValidatedUpdates:
    charged = [int(states[CHARGED_ROUNDS]) for states in good.values() if CHARGED_ROUNDS in states]
    sums = {name: {n: t for n, t in states.items() if n != CHARGED_ROUNDS} for name, states in good.items()}
    return ValidatedUpdates(
        (), aside, num_clients=len(good), statistics=sum_states(sums.values()),
        by_client=sums if "client" in job.privacy.units or job.tune.keep_sums else {},
        charged_rounds=max(charged, default=0),
    )  # fmt: skip


def _fault(reply: Reply, cohort: Sequence[str], form: Form, job: Job) -> str | None:
    if reply.client not in cohort:
        return "not in this round's cohort"
    if isinstance(reply, Failure):
        return reply.reason
    if not isinstance(reply, Measurement) or reply.round != 1:
        return f"sent {type(reply).__name__} of round {reply.round}, expected statistics of round 1"
    forms = {name: tuple(t.shape) for name, t in reply.states.items() if t.dtype == torch.float64}
    if forms != form:
        return f"statistics: expected {form} in float64, found {forms}"
    if "client" in job.privacy.units:
        return None  # values are no reason where clients are promised privacy: the clipped sum sees to them
    if not all(bool(torch.isfinite(t).all()) for t in reply.states.values()):
        return "statistics that are not finite"
    return None if job.privacy.units else _fault_of_counts(reply.states["counts"])


def _fault_of_counts(counts: torch.Tensor) -> str | None:
    if bool((counts < 0).any()) or not 0 < float(counts.sum()) <= MAX_EXAMPLES:
        return f"statistics of {float(counts.sum()):g} examples, expected 1 to {MAX_EXAMPLES}"
    return None


def form_head(
    job: Job,
    gathered: ValidatedUpdates,
    protection: CentralDp | NoProtection,
    round: int,
    model: Tensors,
) -> Tensors | None:
    """The head's tensors that follow from a round's statistics; None where no client sent any.

    Raises:
        BudgetExhausted: its release would exceed the privacy budget; nothing was released.
    """
    if isinstance(protection, CentralDp):
        form = {name: torch.zeros(shape) for name, shape in form_of_statistics(job, model).items()}
        total = protection.privatize_statistics(round, gathered.by_client, form, SENSITIVITY)
        return _noised(job, total, 1)
    if not gathered.statistics:
        return None
    if job.privacy.units:
        return _noised(job, gathered.statistics, gathered.num_valid)
    return solve_head(job, gathered.statistics)


def _noised(job: Job, total: Tensors, releases: int) -> Tensors:
    """The head solved from a sum that contains the noise of `releases` releases."""
    [unit] = job.privacy.units
    dp_plan = dp_plan_of(job, unit)
    tune = job.tune
    assert dp_plan is not None and tune.head_init is not None and tune.feature_norm is not None
    deviation = dp_plan.noise_multiplier * SENSITIVITY * math.sqrt(releases)
    return noised_head(tune.head_init, total, deviation, tune.feature_norm, tune.ridge or RIDGE)


def solve_head(job: Job, total: Tensors) -> Tensors:
    """The head solved from the sum of the clients' statistics."""
    kind, ridge = job.tune.head_init, job.tune.ridge
    assert kind is not None
    return head_of(kind, total, RIDGE if ridge is None else ridge)


def statistics_size(job: Job, model: Tensors) -> int:
    """The size in bytes of one client's statistics."""
    return 8 * sum(math.prod(shape) for shape in form_of_statistics(job, model).values())
