"""`[evaluate]`: how often the model is evaluated, at which clients, and with which baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from atoll.job.federation import WEIGHTED
from atoll.job.privacy import uses_secure_aggregation
from atoll.job.section import Count, Needs, NotNegative, Section

if TYPE_CHECKING:
    from atoll.job.job import Job


class EvaluateSection(Section):
    """`[evaluate]`: how often the global model is evaluated, and with which baselines."""

    every: Count = 1
    clients: Count = 10_000
    patience: Count | None = None
    contributions: Literal["leave-one-out", "shapley"] | None = None
    permutations: Annotated[Count | None, Needs("contributions", ("shapley",))] = None
    truncation: Annotated[NotNegative | None, Needs("contributions", ("shapley",))] = None
    adapt: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    baselines: tuple[Literal["zero_shot", "local_only", "pooled"], ...] = ()
    metrics: dict[str, dict[str, bool | int | float | str | tuple[bool | int | float | str, ...]]] = Field(
        default_factory=dict
    )
    """The options of each additional metric from an extension, by the metric's name."""

    @property
    def permutations_taken(self) -> int:
        """The number of orders of a round's clients from which Shapley values are estimated."""
        return self.permutations or 50

    @property
    def truncation_taken(self) -> float:
        """The difference of the metric up to which two values count as equal in the estimate."""
        return 0.001 if self.truncation is None else self.truncation


def check_measuring(job: Job) -> None:
    """Raises ValueError, in one line that names the key, if what the job asks for can't be evaluated."""
    if job.data.folds is not None and job.privacy.units:
        raise ValueError(
            "data.folds: clients measure nothing under a promise of privacy; expected none with"
            f" privacy.unit = {job.privacy.unit!r}"
        )
    _check_stopping(job)
    _check_adapting(job)
    _check_contributions(job)


def _check_stopping(job: Job) -> None:
    if job.evaluate.patience is None:
        return
    if job.privacy.units:
        raise ValueError(
            "evaluate.patience: which round is best would be chosen by data that is promised privacy;"
            f" expected none with privacy.unit = {job.privacy.unit!r}"
        )
    if not job.data.keeps_back:
        raise ValueError(
            "evaluate.patience: clients keep nothing back to measure on; expected"
            " data.validation_fraction above 0"
        )


def _check_adapting(job: Job) -> None:
    if job.evaluate.adapt is None:
        return
    if job.privacy.units:
        raise ValueError(
            "evaluate.adapt: clients measure nothing under a promise of privacy; expected none with"
            f" privacy.unit = {job.privacy.unit!r}"
        )
    if job.personal.keep is not None:
        raise ValueError("evaluate.adapt: clients have models of their own; expected none with personal.keep")
    if not job.data.keeps_back:
        raise ValueError(
            "evaluate.adapt: clients keep nothing back to measure on; expected"
            " data.validation_fraction above 0"
        )


def _check_contributions(job: Job) -> None:
    if job.evaluate.contributions is None:
        return
    if "client" in job.privacy.units:
        raise ValueError(
            "evaluate.contributions: what a single client's update does would be a release without noise;"
            f" expected none with privacy.unit = {job.privacy.unit!r}"
        )
    if uses_secure_aggregation(job):
        raise ValueError("evaluate.contributions: a secure sum hides single updates; expected none with it")
    if job.strategy.name not in WEIGHTED:
        raise ValueError(
            f"evaluate.contributions: merges the updates of some of a round's clients alone, and"
            f" {job.strategy.name} is for a whole cohort; expected one of {', '.join(WEIGHTED)}"
        )
    if job.personal.splits:
        raise ValueError(
            "evaluate.contributions: the server has no whole model to measure; expected none with"
            f" personal.keep = {job.personal.keep!r}"
        )
    if job.tune.head_init is not None:
        raise ValueError(
            "evaluate.contributions: a head in closed form is made of sums, not of updates; expected none"
            f" with tune.head_init = {job.tune.head_init!r}"
        )
