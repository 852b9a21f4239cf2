"""`tune.head_init`: the head of the first round in closed form, from statistics that add up over clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atoll.job.job import Job

RIDGE = 1.0
"""What weights' squares cost where the job doesn't say."""


def check_closed_form(job: Job) -> None:
    """Raises ValueError, in one line that names the key, where no head can be had in closed form."""
    if job.tune.head_init is None:
        return
    if job.tune.method != "head" or job.tune.hidden is not None:
        found = "tune.hidden" if job.tune.hidden is not None else f"tune.method = {job.tune.method!r}"
        raise ValueError(
            f"tune.head_init: a closed form is there for a linear head on a frozen backbone, found {found}"
        )
    if job.privacy.units:
        raise ValueError(
            "tune.head_init: the clients' sums of features would travel without noise; expected none with"
            f" privacy.unit = {job.privacy.unit!r}"
        )
    if job.federation.secure_aggregation:
        raise ValueError(
            "tune.head_init: the server would see each client's sums of features; expected none with"
            " federation.secure_aggregation"
        )
    if job.train.teacher is not None:
        raise ValueError("tune.head_init: a closed form knows no teacher; expected none with train.teacher")


def is_closed_form_round(job: Job, round: int) -> bool:
    """Whether this round's head is made of statistics, and nothing is trained."""
    return job.tune.head_init is not None and round == 1


def statistics_shapes(job: Job, classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shape of each statistic, all in float64: how many examples a class has, their features' sum, …"""
    squares = {"squares": (width,)} if job.tune.head_init == "prototype" else {"gram": (width, width)}
    return {"counts": (classes,), "sums": (classes, width), **squares}
