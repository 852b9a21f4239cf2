"""The numbers behind a job's promise of privacy: noise, number of releases and sampling rate.

Every number here is public: it follows from the job alone, never from anybody's data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import PLACES, DpGuarantee, Unit, expected_cohort, local_steps
from atoll.privacy.accounting import Composition, Release, calibrate, compose, within
from atoll.privacy.banded import cost_of_round, sensitivity_of, squared_sensitivity

SUMMING = 1e-12
"""The relative difference that rounding may make between a planned run's summed costs and its plan."""


@dataclass(frozen=True)
class DpPlan:
    """The resolved plan of one promise: the mechanism's noise, and what the whole run spends.

    A unit takes part in at most `releases` releases in the run, `per_round` of them in a round; each costs
    `event`. A noised sum is divided by `divisor`. With several `bands` a round's release costs
    `cost_of_round` instead, and `event` is the cost of each participation of a client.
    """

    unit: Unit
    where: str
    promise: DpGuarantee
    delta: float
    event: Release
    releases: int
    per_round: int
    divisor: float
    bands: int = 1

    @property
    def count_deviation(self) -> float | None:
        """The deviation of the noise on the counts of adaptive clipping; None where the norm is fixed.

        By default a twentieth of what is expected in a sum (Andrew et al. 2021, section 3.1).
        """
        if self.promise.clipping == "fixed":
            return None
        return self.promise.count_deviation or max(self.divisor / 20, self.noise_multiplier)

    @property
    def noise_multiplier(self) -> float:
        return self.event.noise_multiplier

    @property
    def planned(self) -> Mapping[Release, int]:
        """All releases of the whole run, if no round is repeated."""
        if self.bands == 1:
            return {self.event: self.releases}
        return {Release(self.noise_multiplier / planned_sensitivity(self.releases, self.bands), 1.0): 1}

    def cost_of_round(self, charged: Mapping[int, int], round: int) -> Release:
        """The cost of the server's release of a round; `charged` has the charges of each round so far."""
        if self.bands == 1:
            return self.event
        return cost_of_round(charged, round, self.noise_multiplier, self.bands)

    def within_budget(self, spent: Composition, count: int, cost: Release | None = None) -> bool:
        """Whether `count` more releases stay within the target epsilon; True where there is no target."""
        target, more = self.promise.epsilon, {cost or self.event: count}
        if target is None:
            return True
        total = compose(spent, more)
        if self._is_planned(total):
            return True  # no more than what the noise was calibrated for
        return within(total, self.delta, target)

    def _is_planned(self, total: Counter[Release]) -> bool:
        if self.bands == 1:
            return set(total) <= {self.event} and sum(total.values()) <= self.releases
        sensitivity = sensitivity_of(total, self.noise_multiplier)
        return sensitivity <= planned_sensitivity(self.releases, self.bands) * (1 + SUMMING)


def planned_sensitivity(rounds: int, bands: int) -> float:
    """The sensitivity, in clipping norms, of a run of `rounds` rounds that are not repeated."""
    return math.sqrt(squared_sensitivity(dict.fromkeys(range(1, rounds + 1), 1), bands))


def dp_plan_of(job: Job, unit: Unit) -> DpPlan | None:
    """The plan for a unit (client or example), or None where the job promises it nothing.

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
    dp_plan = DpPlan(
        unit, where, promise, promise.delta, cost, rounds * per_round, per_round, divisor, promise.separation
    )
    _check_count(dp_plan)
    return dp_plan


def _check_count(dp_plan: DpPlan) -> None:
    """Raises ConfigError where the count of adaptive clipping would cost more than sum and count may."""
    deviation, noise = dp_plan.count_deviation, dp_plan.noise_multiplier
    if deviation is not None and not 2 * deviation > noise:
        raise ConfigError(
            f"privacy.count_deviation: expected more than {noise / 2:.3g}, half of the noise multiplier,"
            f" found {deviation:g}: the count alone would cost more than it and the sum together may"
        )


def distributed_terms(job: Job) -> DpPlan | None:
    """The plan of the promise whose noise all clients add together in a secure sum, if there is one."""
    plans = [dp_plan_of(job, unit) for unit in job.privacy.units]
    return next(
        (dp_plan for dp_plan in plans if dp_plan is not None and dp_plan.where == "distributed"), None
    )


def _calibrated(promise: DpGuarantee, delta: float, rate: float, releases: int, unit: Unit) -> float:
    assert promise.epsilon is not None
    try:
        if promise.separation > 1:
            one = calibrate(promise.epsilon, delta=delta, sampling_rate=1.0, releases=1)
            return one * planned_sensitivity(releases, promise.separation)
        return calibrate(promise.epsilon, delta=delta, sampling_rate=rate, releases=releases)
    except ValueError as error:
        raise ConfigError(f"privacy.epsilon: {error} (unit {unit!r}, {releases} releases)") from None
