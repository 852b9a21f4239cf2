"""Which value of a hyper-parameter is best under each promise, and what it costs to have looked.

The figures assume that the best run is told by test data that the promise doesn't cover. All runs are
counted, also those that differ in the seed alone: each of them was trained on the private data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atoll.privacy.accounting import Composition, Release
from atoll.privacy.dp_plan import dp_plan_of
from atoll.privacy.selection import Poisson, TruncatedNegativeBinomial, epsilon_of_all, epsilon_of_best
from atoll.sim.sweep.grid import Values, format_value
from atoll.sim.sweep.results import (
    Estimate,
    Row,
    best,
    combinations,
    describe_estimate,
    grouped,
    scores,
    values_of,
)


@dataclass(frozen=True)
class Pick:
    """The best of some trials under one promise.

    `once` is the epsilon of one run; `all_trials` that of all of them, which a full grid spends; with a
    `geometric` or `poisson` random number of runs, as many on average, the best alone would have cost less.
    """

    promise: Values
    chosen: Values
    score: str
    trials: int
    once: float
    all_trials: float
    geometric: float
    poisson: float


def searched(values: Values) -> list[str]:
    """The varied keys that are no part of a promise: hyper-parameters."""
    return [key for key in values if not key.startswith("privacy.")]


def selections(rows: Sequence[Row]) -> list[Pick]:
    """One for each promise whose runs differ in a hyper-parameter; none where no hyper-parameter varies."""
    if not rows or not searched(rows[0].values):
        return []
    keys = searched(rows[0].values)
    promised = [key for key in rows[0].values if key not in keys]
    private = [row for row in rows if row.is_private and row.score is not None]
    groups = grouped(private, lambda row: values_of(row, promised)).values()
    return [_pick(group, keys, promised) for group in groups if len(combinations(group)) > 1]


def _pick(rows: Sequence[Row], keys: Sequence[str], promised: Sequence[str]) -> Pick:
    chosen = best(combinations(rows))
    once, everything, geometric, poisson = max(
        (_costs(rows, unit) for unit in rows[0].job.privacy.units), key=lambda costs: costs[1]
    )
    return Pick(
        promise={key: rows[0].values[key] for key in promised},
        chosen={key: chosen[0].values[key] for key in keys},
        score=describe_estimate(Estimate.of(scores(chosen))),
        trials=len(rows),
        once=once,
        all_trials=everything,
        geometric=geometric,
        poisson=poisson,
    )


def _costs(rows: Sequence[Row], unit: str) -> tuple[float, float, float, float]:
    """Epsilon of the dearest run, of all runs, and of the best of a random number of them."""
    spent = [_spent(row, unit) for row in rows]
    delta = max(row.privacy["units"][unit]["delta"] for row in rows)
    once = max(epsilon_of_all([run], delta) for run in {tuple(s.items()): s for s in spent}.values())
    number = len(rows)
    geometric = TruncatedNegativeBinomial(shape=1, gamma=1 / number)
    return (
        once,
        epsilon_of_all(spent, delta),
        epsilon_of_best(spent, delta, geometric),
        epsilon_of_best(spent, delta, Poisson(number)),
    )


def _spent(row: Row, unit: str) -> Composition:
    """The releases that a run was charged."""
    dp_plan = dp_plan_of(row.job, "client" if unit == "client" else "example")
    assert dp_plan is not None
    claim = row.privacy["units"][unit]
    if dp_plan.bands > 1:
        return {Release(dp_plan.noise_multiplier / claim["sensitivity"], 1.0): 1}
    return {dp_plan.event: int(claim["releases"])}


def describe_selection(pick: Pick) -> str:
    """A line a promise."""
    promise = ", ".join(f"{key} {format_value(value)}" for key, value in pick.promise.items())
    chosen = ", ".join(f"{key} {format_value(value)}" for key, value in pick.chosen.items())
    return (
        f"{f'{promise}: ' if promise else ''}best with {chosen} ({pick.score}). One run spends epsilon"
        f" {pick.once:.3g}; having looked at all {pick.trials} runs spends {pick.all_trials:.3g}. Had their"
        f" number been drawn at random, {pick.trials} on average, and the best alone been kept:"
        f" {pick.geometric:.3g} (geometric), {pick.poisson:.3g} (Poisson)."
    )
