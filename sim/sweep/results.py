"""What a sweep found: one row a run, means over seeds, and what privacy costs in a sentence."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from atoll.job.job import Job
from atoll.report.comparison import comparison_of, finite
from atoll.report.run_result import RunPrivacy, RunResult
from atoll.report.text import metric_label
from atoll.sim.sweep.grid import EPSILON, Planned, Values, format_value
from atoll.tasks.metric_values import MetricValues, lower_is_better

LEVEL = 0.95
"""Of every interval: Student's t over seeds."""

REFERENCES = {"pooled": "pooled data", "local_only": "every client alone", "zero_shot": "untrained"}
"""Baselines that are drawn beside the runs, and what they are called."""


@dataclass(frozen=True)
class Row:
    """One complete run; `values` has what it was given for each varied key."""

    values: Values
    job: Job
    metrics: Mapping[str, float]
    primary_metric: str | None
    baselines: Mapping[str, MetricValues]
    privacy: RunPrivacy
    model_sha256: str
    seconds: float
    path: str

    @classmethod
    def of(cls, run: Planned, result: RunResult, path: str) -> Row:
        """From a complete run."""
        compared = comparison_of(result, by_folds=run.job.data.folds is not None)
        federated = compared.rows.get("federated", {})
        metrics = {
            name: value for name in compared.metrics if (value := finite(federated.get(name))) is not None
        }
        return cls(
            run.values,
            run.job,
            metrics,
            compared.headline if federated else None,
            result.baselines,
            result.privacy,
            result.model_sha256,
            result.seconds,
            path,
        )

    @property
    def score(self) -> float | None:
        """The metric that the run is judged by."""
        return None if self.primary_metric is None else self.metrics.get(self.primary_metric)

    @property
    def is_private(self) -> bool:
        return bool(self.job.privacy.units)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, the standard deviation of one run, and half the mean's 95 % interval.

    With one seed there are no other two: they are None.
    """

    mean: float
    deviation: float | None
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one value.

        >>> Estimate.of([1.0, 2.0, 3.0]).half  # 4.3027 * 1 / sqrt(3)
        2.484...
        """
        count = len(values)
        if count < 2:
            return cls(fmean(values), None, None, count)
        deviation = stdev(values)
        student = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
        return cls(fmean(values), deviation, student * deviation / math.sqrt(count), count)


Key = tuple[Hashable, ...]


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """The rows by what `key` makes of them, in the order in which it is first seen."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def values_of(row: Row, keys: Iterable[str]) -> Key:
    """What a run was given for those keys, as something that can be compared and looked up."""
    return tuple(v if isinstance(v := row.values[key], Hashable) else str(v) for key in keys)


def combinations(rows: Sequence[Row]) -> list[list[Row]]:
    """The runs that differ in nothing but the seed, together."""
    return list(grouped(rows, lambda row: values_of(row, row.values)).values())


def scores(rows: Iterable[Row]) -> list[float]:
    """What is known of the metric that the runs are judged by."""
    return [row.score for row in rows if row.score is not None]


def headline_of(rows: Sequence[Row]) -> str | None:
    """The metric that the sweep is judged by."""
    return next((row.primary_metric for row in rows if row.primary_metric is not None), None)


def reference(rows: Sequence[Row], name: str) -> Estimate | None:
    """A baseline's mean over seeds; each seed counts once, however many of its runs have measured it.

    A baseline knows of no promise, but of hyper-parameters: where they vary, the best mean counts.
    """
    by_key: dict[Key, dict[int, float]] = {}
    for row in rows:
        value = finite(row.baselines.get(name, {}).get(row.primary_metric or ""))
        if value is not None:
            group = values_of(row, [key for key in row.values if not key.startswith("privacy.")])
            by_key.setdefault(group, {}).setdefault(row.job.seed, value)
    estimates = [Estimate.of(list(by_seed.values())) for by_seed in by_key.values()]
    sign = -1 if lower_is_better(headline_of(rows) or "") else 1
    return max(estimates, key=lambda estimate: sign * estimate.mean, default=None)


@dataclass(frozen=True)
class Loss:
    """How much worse one combination is than the same without privacy, seed by seed."""

    values: Values
    metric: str
    points: Estimate
    score: float

    @property
    def epsilon(self) -> float:
        return float(self.values[EPSILON])


def losses(rows: Sequence[Row]) -> list[Loss]:
    """One for each private combination that has seeds in common with the same without privacy."""
    others = [key for key in rows[0].values if not key.startswith("privacy.")] if rows else []
    metric = headline_of(rows)
    if metric is None or EPSILON not in rows[0].values:
        return []
    plain = {(values_of(row, others), row.job.seed): row.score for row in rows if not row.is_private}
    sign = -1 if lower_is_better(metric) else 1
    losses_found = []
    for group in combinations([row for row in rows if row.is_private]):
        pairs = [(plain.get((values_of(row, others), row.job.seed)), row.score) for row in group]
        differences = [sign * (a - b) * scale_of(metric) for a, b in pairs if a is not None and b is not None]
        if differences:
            mean = fmean(scores(group))
            losses_found.append(Loss(group[0].values, metric, Estimate.of(differences), mean))
    return losses_found


def scale_of(metric: str) -> float:
    """Shares between 0 and 1 are told in points of a hundred, all else as it is."""
    return 100.0 if "accuracy" in metric or "f1" in metric.split("_") else 1.0


def sentence(rows: Sequence[Row]) -> str:
    """What privacy costs at the epsilon nearest to 1, or, where epsilon doesn't vary, what is best."""
    if not scores(rows):
        return "No run was measured: the job holds no test data out."
    if EPSILON not in rows[0].values:
        return _best_sentence(rows)
    all_losses = losses(rows)
    if not all_losses:
        return (
            "There is no run without privacy to compare with:"
            f" add inf to --vary {EPSILON}, and the loss is told seed by seed."
        )
    nearest = min((loss.epsilon for loss in all_losses), key=lambda epsilon: abs(math.log(epsilon)))
    sentences = [
        _describe_loss(loss) for loss in _best_of_each([f for f in all_losses if f.epsilon == nearest])
    ]
    seeds = all_losses[0].points.count
    over = f"95 % interval over {seeds} seeds" if seeds > 1 else "one seed, so that there is no interval"
    return f"At epsilon {nearest:g} {'; '.join(sentences)} ({over})."


def _best_of_each(all_losses: Sequence[Loss]) -> list[Loss]:
    """Of those that differ in nothing but hyper-parameters, the one with the best metric."""
    chosen: dict[Key, Loss] = {}
    for loss in sorted(all_losses, key=lambda f: f.score, reverse=not lower_is_better(all_losses[0].metric)):
        chosen.setdefault(
            tuple(format_value(v) for k, v in loss.values.items() if k.startswith("privacy.")), loss
        )
    return [loss for loss in all_losses if loss in chosen.values()]


def _describe_loss(loss: Loss) -> str:
    half = "" if loss.points.half is None else f" ± {loss.points.half:{_digits(loss.metric)}}"
    unit = "points of " if scale_of(loss.metric) == 100 else "of "
    verb = "lose" if loss.points.mean >= 0 else "gain"
    other = ", ".join(f"{k} {format_value(v)}" for k, v in loss.values.items() if k != EPSILON)
    return (
        f"{f'with {other} ' if other else ''}you {verb} {abs(loss.points.mean):{_digits(loss.metric)}}{half}"
        f" {unit}{metric_label(loss.metric)} against the same run without privacy"
    )


def _digits(metric: str) -> str:
    return ".1f" if scale_of(metric) == 100 else ".3f"


def _best_sentence(rows: Sequence[Row]) -> str:
    metric = headline_of(rows)
    assert metric is not None
    group = best(combinations(rows))
    estimate = Estimate.of(scores(group))
    score = describe_estimate(estimate)
    values = ", ".join(f"{k} {format_value(v)}" for k, v in group[0].values.items() if v is not None)
    if not values:
        return f"The {metric_label(metric)} is {score} over {estimate.count} folds and seeds."
    return f"The best {metric_label(metric)}, {score}, has {values}."


def best(groups: Sequence[Sequence[Row]]) -> Sequence[Row]:
    """The group with the best mean; there must be one that was measured."""
    measured = [group for group in groups if scores(group)]
    metric = headline_of([row for group in measured for row in group])
    sign = -1 if lower_is_better(metric or "") else 1
    return max(measured, key=lambda group: sign * fmean(scores(group)))


def describe_estimate(estimate: Estimate) -> str:
    """Mean and standard deviation.

    >>> describe_estimate(Estimate.of([0.8, 0.9]))
    '0.850 ± 0.071'
    """
    spread = "" if estimate.deviation is None else f" ± {estimate.deviation:.3f}"
    return f"{estimate.mean:.3f}{spread}"


@dataclass(frozen=True)
class Line:
    """A row of the table: one combination."""

    values: Values
    seeds: int
    score: str
    epsilon: str


def table(rows: Sequence[Row]) -> list[Line]:
    """Each combination with the mean and deviation of its metric, and the epsilon that was really spent."""
    lines = []
    for group in combinations(rows):
        scores_found = scores(group)
        score = describe_estimate(Estimate.of(scores_found)) if scores_found else "not measured"
        lines.append(Line(group[0].values, len(group), score, _describe_spent(group)))
    return lines


def _describe_spent(group: Sequence[Row]) -> str:
    """The epsilon spent, the largest of all seeds; `inf` where no number stands for it."""
    if not group[0].is_private:
        return "no privacy"
    spent = [row.privacy["epsilon"] for row in group]
    finite_ones = [value for value in spent if value is not None]
    return "inf" if len(finite_ones) < len(spent) else f"{max(finite_ones):.3g}"


def as_csv(rows: Sequence[Row]) -> str:
    """One line a run: what was varied, the seed, what was measured, what was spent, and where it lies."""
    keys = list(rows[0].values) if rows else []
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    spent = ["epsilon_spent", "delta", "noise_multiplier"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    repeats = ["seed", "fold"] if rows and rows[0].job.data.folds is not None else ["seed"]
    writer.writerow([*keys, *repeats, *metrics, *spent, "model_sha256", "seconds", "path"])
    for row in rows:
        promised = [row.privacy["epsilon"], row.privacy["delta"], row.privacy["noise_multiplier"]]
        if row.is_private and promised[0] is None:
            promised[0] = math.inf
        measured = [row.metrics.get(name) for name in metrics]
        cells = [None if (v := row.values[key]) is None else format_value(v) for key in keys]
        numbers = [row.job.seed, row.job.data.fold][: len(repeats)]
        writer.writerow(
            [*cells, *numbers, *measured, *promised, row.model_sha256, f"{row.seconds:.3f}", row.path]
        )
    return text.getvalue()
