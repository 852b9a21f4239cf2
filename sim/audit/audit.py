"""Attack a simulated run: play it again with canaries, guess which were in, and bound epsilon from below."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import Unit
from atoll.privacy.auditing.epsilon_bounds import (
    GAUSSIAN,
    Family,
    Guesses,
    Membership,
    Vector,
    best,
    lower_bound,
    lower_bound_in_family,
)
from atoll.privacy.auditing.gaussian_sums import SURE, lower_bound_by_sums
from atoll.privacy.auditing.membership import area, epsilon_of_rates, log_ratios, rate_at
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.noise import entropy, uniform
from atoll.report.comparison import finite
from atoll.report.page import write_report
from atoll.report.run_result import RunResult
from atoll.server.events import EventCallback
from atoll.sim.audit.client_canaries import CanaryClients
from atoll.sim.audit.example_canaries import CanaryFeatures
from atoll.sim.audit.mislabelled_canaries import Mislabelled, candidates
from atoll.sim.audit.replay import Canaries, fresh_learner, job_to_replay, replayed
from atoll.sim.engines.events import AuditAdvanced
from atoll.sim.population.population import Population

DEFAULT_CANARIES = 5000
"""Canaries of an audit, unless another number is asked for or there can't be so many."""
CANARIES_AT_THE_END = 256
"""The same where a run audits itself, at its end."""
MIN_CANARIES = 16
USUAL_DELTA = 1e-5
"""At which a run that promised nothing is measured."""

RoundsPlayed = Callable[[int, int], None]
"""Told how many rounds are played, of how many."""


@dataclass(frozen=True)
class Audit:
    """How hard to attack: with how many canaries, how sure to be, and with how many shadow runs.

    Without `canaries` there are as many as `usual`, or as there can be.
    """

    canaries: int | None = None
    confidence: float = 0.95
    shadows: int = 0
    usual: int = DEFAULT_CANARIES

    def __post_init__(self) -> None:
        if self.canaries is not None and self.canaries < MIN_CANARIES:
            raise ConfigError(f"--canaries: expected {MIN_CANARIES} or more, found {self.canaries}")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"--confidence: expected a number from 0.5 to below 1, found {self.confidence}")
        if self.shadows != 0 and self.shadows < 2:
            raise ConfigError(f"--shadows: expected none, or 2 or more, found {self.shadows}")


def audited(
    job: Job, claim: Mapping[str, Any], how: Audit, *, population: Population, watch: RoundsPlayed
) -> dict[str, Any]:
    """What the attack found, for each unit that the job promises something, or for examples without one.

    `claim` is the `privacy` of the run's result.
    """
    replay = job_to_replay(job)
    claims = claim.get("units") or {claim.get("unit"): claim}
    units: tuple[Unit, ...] = job.privacy.units or ("example",)
    plays = len(units) * (1 + how.shadows) * job.federation.rounds
    played = 0

    def progress() -> None:
        nonlocal played
        played += 1
        watch(played, plays)

    findings = {}
    for unit in units:
        canaries = canaries_for(replay, population, unit, how)
        runs = [_run(replay, population, canaries, progress) for _ in range(1 + how.shadows)]
        findings[unit] = judged(replay, unit, claims.get(unit), canaries, runs, how)
    return {
        "confidence": how.confidence,
        "units": findings,
        "contradicted": any(each["contradicted"] for each in findings.values()),
    }


def takes_canaries(job: Job) -> bool:
    """Whether there are canaries for what the job promises; texts have no classes to mislabel."""
    return job.task.name != "language-modeling" or job.privacy.units == ("client",)


def _run(
    job: Job, population: Population, canaries: Canaries, progress: Callable[[], None]
) -> tuple[Vector, Membership]:
    """(scores, which were inside) of one run with fresh coins and fresh noise."""
    inside = uniform(entropy(canaries.count)) < 0.5
    return replayed(job, population, canaries, inside, progress), inside


def canaries_for(job: Job, population: Population, unit: Unit, how: Audit) -> Canaries:
    """The canaries that hit a unit's promise hardest.

    Raises:
        ConfigError: there can't be so many.
    """
    learner = fresh_learner(job, population)
    if unit == "client":
        dp_plan, model = dp_plan_of(job, "client"), learner.initial()
        assert dp_plan is not None
        number = _fitting(how, CanaryClients.most(model), "different directions of updates")
        return CanaryClients(population, job, dp_plan, model, number)
    if learner.trains_on_features:
        number = _fitting(how, CanaryFeatures.most(population, learner), "different features and labels")
        return CanaryFeatures.of(population, learner, number)
    most = len(candidates(population, learner)) // 2
    return Mislabelled.of(population, learner, _fitting(how, most, "examples to mislabel"))


def _fitting(how: Audit, most: int, what: str) -> int:
    number = how.canaries or MIN_CANARIES
    if number > most:
        raise ConfigError(
            f"canaries: expected {most} at most, for the job has so many {what}, found {number}"
        )
    return how.canaries or min(how.usual, most)


def judged(
    job: Job,
    unit: Unit,
    claim: Mapping[str, Any] | None,
    canaries: Canaries,
    runs: list[tuple[Vector, Membership]],
    how: Audit,
) -> dict[str, Any]:
    """One unit's bounds beside its claim; the first of the runs is judged, the others are its shadows."""
    dp_plan = dp_plan_of(job, unit)
    scores, inside = runs[0]
    delta = dp_plan.delta if dp_plan is not None else USUAL_DELTA
    releases = int((claim or {}).get("releases") or (dp_plan.releases if dp_plan is not None else 1))
    family = Family(dp_plan.event.sampling_rate, releases) if dp_plan is not None else GAUSSIAN

    def plain(guesses: Guesses, confidence: float) -> float:
        return lower_bound(guesses, delta=delta, confidence=confidence)

    def of_kind(guesses: Guesses, confidence: float) -> float:
        return lower_bound_in_family(guesses, family, delta=delta, confidence=confidence)

    one_run = best(scores, inside, plain, how.confidence)
    f_dp = best(scores, inside, of_kind, how.confidence)
    sums = None
    if dp_plan is not None and canaries.scores_are_sums:
        sure = max(how.confidence, SURE)
        sums = lower_bound_by_sums(scores, inside, family, delta=delta, confidence=sure)
    claimed = finite((claim or {}).get("epsilon"))
    least = max(one_run.epsilon, f_dp.epsilon, 0.0 if sums is None else sums.epsilon)
    return {
        "attack": canaries.what,
        "canaries": len(scores),
        "inside": int(inside.sum()),
        "claimed_epsilon": claimed,
        "delta": delta,
        "one_run": one_run.to_json(),
        "f_dp": f_dp.to_json(),
        "gaussian_sums": None if sums is None else sums.to_json(),
        "membership": _membership(runs, delta, how.confidence) if how.shadows else None,
        "contradicted": claimed is not None and least > claimed,
    }


def _membership(runs: list[tuple[Vector, Membership]], delta: float, confidence: float) -> dict[str, Any]:
    (scores, inside), shadows = runs[0], runs[1:]
    ratios = log_ratios(scores, np.stack([s for s, _ in shadows]), np.stack([i for _, i in shadows]))
    return {
        "shadows": len(shadows),
        "tpr_at_fpr_0.001": rate_at(ratios, inside, 0.001),
        "tpr_at_fpr_0.01": rate_at(ratios, inside, 0.01),
        "auc": area(ratios, inside),
        "epsilon": epsilon_of_rates(ratios, inside, delta=delta, confidence=confidence),
    }


logger = logging.getLogger(__name__)


def attack_at_the_end(
    job: Job, population: Population, out: Path, result: RunResult, on_event: EventCallback
) -> RunResult:
    """The result with what the attack found under `privacy.audit`, written down and in the report.

    A job that has no room for canaries keeps its result as it is, and the run's log says why.
    """

    def played(done: int, total: int) -> None:
        on_event(AuditAdvanced(done, total))

    try:
        findings = audited(
            job, result.privacy, Audit(usual=CANARIES_AT_THE_END), population=population, watch=played
        )
    except ConfigError as error:
        logger.warning("no audit: %s", error)
        return result
    result = replace(result, privacy={**result.privacy, "audit": findings})
    result.write(out)
    write_report(out, result)
    return result
