"""A job's promises in numbers: how much noise, for how many releases, at which sampling rate.

Every number here is public: it follows from the job alone, never from anybody's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import PLACES, DpGuarantee, Unit, expected_cohort, local_steps
from atoll.privacy.accounting import Composition, Release, calibrate, compose, within


@dataclass(frozen=True)
class DpPlan:
    """What a unit is promised, resolved.

    `releases` is how many a unit can be part of in the whole run, each of kind `cost`, `per_round` of
    them in a round; `divisor` is what a noised sum is divided by.
    """

    unit: Unit
    where: str
    promise: DpGuarantee
    delta: float
    event: Release
    releases: int
    per_round: int
    divisor: float

    @property
    def noise_multiplier(self) -> float:
        return self.event.noise_multiplier

    @property
    def planned(self) -> Mapping[Release, int]:
        """What the whole run spends, if nothing has to be done twice."""
        return {self.event: self.releases}

    def within_budget(self, spent: Composition, count: int) -> bool:
        """Whether `count` more releases stay within the target; without one, everything does."""
        target = self.promise.epsilon
        if target is None:
            return True
        if set(spent) <= {self.event} and sum(spent.values()) + count <= self.releases:
            return True  # no more than what the noise was calibrated for
        return within(compose(spent, {self.event: count}), self.delta, target)


def dp_plan_of(job: Job, unit: Unit) -> DpPlan | None:
    """The terms of a unit, or None where the job promises it nothing.

    Raises:
        ConfigError: no noise reaches the target epsilon.
    """
    promise = job.privacy.promise(unit)
    if promise is None:
        return None
    where, rounds = promise.where or PLACES[unit][0], job.federation.rounds
    if unit == "client":
        # Who takes part in a secure sum is known to all who do, so that sampling them hides nothing.
        rate = (job.federation.cohort_rate or 1.0) if where == "server" else 1.0
        per_round, divisor = 1, expected_cohort(job)
    else:
        rate = promise.sampling_rate or 1.0
        per_round, divisor = local_steps(job), float(job.train.batch_size)
        divisor *= expected_cohort(job) if where == "distributed" else 1.0
    assert promise.delta is not None
    noise = promise.noise_multiplier
    if noise is None:
        noise = _calibrated(promise, promise.delta, rate, rounds * per_round, unit)
    cost = Release(noise, rate)
    return DpPlan(unit, where, promise, promise.delta, cost, rounds * per_round, per_round, divisor)


def distributed_terms(job: Job) -> DpPlan | None:
    """The terms of the promise whose noise the clients add together, if there is one."""
    found = [dp_plan_of(job, unit) for unit in job.privacy.units]
    return next(
        (dp_plan for dp_plan in found if dp_plan is not None and dp_plan.where == "distributed"), None
    )


def _calibrated(promise: DpGuarantee, delta: float, rate: float, releases: int, unit: Unit) -> float:
    assert promise.epsilon is not None
    try:
        return calibrate(promise.epsilon, delta=delta, sampling_rate=rate, releases=releases)
    except ValueError as error:
        raise ConfigError(f"privacy.epsilon: {error} (unit {unit!r}, {releases} releases)") from None
