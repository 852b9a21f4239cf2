"""A site's own rules for jobs: `policy.toml` in its kit, which is checked first and no server can change.

Without the file a site accepts what its kit's budget and the job's promise of privacy allow.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import uses_secure_aggregation
from atoll.kit.kit import KitTable, read_table
from atoll.privacy.accounting import epsilon
from atoll.privacy.dp_plan import dp_plan_of
from atoll.protocol.messages import Hello
from atoll.protocol.requests import EvaluateRequest, Request

POLICY = "policy.toml"
Count = Annotated[int, Field(strict=True, ge=1)]
Names = Annotated[list[str], Field(min_length=1)]


def _hours(text: str) -> str:
    """A span of times such as `08:00-17:30`, with two digits each, so that they compare as text."""
    try:
        times = [time.strptime(part.strip(), "%H:%M") for part in text.split("-")]
        first, last = (f"{moment.tm_hour:02d}:{moment.tm_min:02d}" for moment in times)
    except ValueError:
        raise ValueError(f"expected two times such as '18:00-06:00', found {text!r}") from None
    if first == last:
        raise ValueError(f"expected two different times, found {text!r}")
    return f"{first}-{last}"


class PrivacyRules(KitTable):
    """`[privacy]`: the promise that every job must make here; without this table a job need not make any."""

    units: list[Literal["example", "client"]] = Field(default_factory=list, min_length=1)
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    secure_sum: bool = False


class Policy(KitTable):
    """A site's rules for jobs; a rule that is left out forbids nothing.

    `columns` are those that a job may name, `folders` are where paths in a job may lie, `min_clients` is how
    many clients must train in every round, and `hours` when requests are answered, by this machine's clock.
    """

    tasks: Names | None = None
    backbones: Names | None = None
    tuning: Names | None = None
    strategies: Names | None = None
    columns: list[str] | None = None
    folders: list[Path] | None = None
    max_rounds: Count | None = None
    max_epochs: Count | None = None
    max_threads: Count = os.cpu_count() or 1
    max_image_size: Count | None = None
    min_clients: Count | None = None
    download: bool = False
    measurements: bool = True
    hours: Annotated[str, AfterValidator(_hours)] | None = None
    privacy: PrivacyRules = PrivacyRules()
    _violations: dict[str, str] = PrivateAttr(default_factory=dict)
    """The rule that each job violates, by the job's hash."""

    @classmethod
    def load(cls, kit: Path) -> Policy | None:
        """The policy in a site's kit; None where it has none.

        Raises:
            ConfigError: the file isn't a policy; the line names it and the key.
        """
        path = kit / POLICY
        if not (path.exists() or path.is_symlink()):
            return None
        if not path.is_file():
            raise ConfigError(f"{path}: expected a file")
        return read_table(path, cls)

    def verdicts(self, job: Job) -> list[Verdict]:
        """The verdicts of all rules on a job, in the order of the rules; none for rules that are left out."""
        return [rule for check in RULES for rule in check(self, job)]

    def violation(self, job: Job, kind: type[Request] | type[Hello]) -> str:
        """The first rule that forbids a request of this kind for the job, as a sentence; "" if none does."""
        if kind is EvaluateRequest and not self.measurements:
            return "its policy: measurements = false, no metric leaves the site"
        if not self.is_open():
            return f"its policy: hours = {self.hours!r}, expected a request within them"
        if job.hash not in self._violations:
            broken = next((verdict for verdict in self.verdicts(job) if not verdict.holds), None)
            self._violations[job.hash] = f"its policy: {broken.description}" if broken else ""
        return self._violations[job.hash]

    def is_open(self) -> bool:
        """Whether requests are answered at this time of day."""
        if self.hours is None:
            return True
        first, last = self.hours.split("-")
        now = time.strftime("%H:%M")
        return first <= now < last if first < last else not last <= now < first


@dataclass(frozen=True)
class Verdict:
    """One rule of a policy applied to a job: the job's key, the value there, and whether the rule holds."""

    rule: str
    key: str
    job_value: str
    allowed: str
    holds: bool

    @property
    def description(self) -> str:
        """`max_rounds: expected at most 100, found federation.rounds = 500`."""
        return f"{self.rule}: expected {self.allowed}, found {self.key} = {self.job_value}"


def _one_of(rule: str, key: str, find: Callable[[Job], str]) -> Callable[[Policy, Job], Iterator[Verdict]]:
    def check(policy: Policy, job: Job) -> Iterator[Verdict]:
        names = getattr(policy, rule)
        if names is not None:
            value = find(job)
            yield Verdict(rule, key, value, f"one of {', '.join(names)}", value in names)

    return check


def _at_most(
    rule: str, key: str, find: Callable[[Job], int | None]
) -> Callable[[Policy, Job], Iterator[Verdict]]:
    def check(policy: Policy, job: Job) -> Iterator[Verdict]:
        most, value = getattr(policy, rule), find(job)
        if most is not None and value is not None:
            yield Verdict(rule, key, str(value), f"at most {most}", value <= most)

    return check


def _tuning(policy: Policy, job: Job) -> Iterator[Verdict]:
    if policy.tuning is None:
        return
    for stage in job.stages:
        method = stage.tune.method
        yield Verdict(
            "tuning", "tune.method", method, f"one of {', '.join(policy.tuning)}", method in policy.tuning
        )


def _columns(policy: Policy, job: Job) -> Iterator[Verdict]:
    if policy.columns is None:
        return
    allowed = ", ".join(policy.columns) or "none"
    for key, column in job.data.named_columns.items():
        yield Verdict("columns", key, column, f"one of {allowed}", column in policy.columns)


def _folders(policy: Policy, job: Job) -> Iterator[Verdict]:
    """The rule on paths in a job, which the site would open: even whether a file exists is private."""
    if policy.folders is None:
        return
    allowed = [folder.resolve() for folder in policy.folders]
    named = {
        "backbone.name": job.backbone.name,
        "backbone.weights": job.backbone.weights,
        "train.teacher": job.train.teacher,
    }
    for key, value in named.items():
        if value is not None and (value.startswith("~") or Path(value).is_absolute()):
            place = Path(value).expanduser().resolve()
            holds = any(place.is_relative_to(folder) for folder in allowed)
            yield Verdict("folders", key, value, "a path in one of the folders that it allows", holds)


def _download(policy: Policy, job: Job) -> Iterator[Verdict]:
    if not policy.download:
        offline = job.backbone.offline or job.backbone.weights == "random"
        yield Verdict("download", "backbone.offline", str(offline).lower(), "true", offline)


def _min_clients(policy: Policy, job: Job) -> Iterator[Verdict]:
    if policy.min_clients is None:
        return
    federation = job.federation
    if federation.cohort_rate is not None:  # any number may be drawn
        yield Verdict(
            "min_clients",
            "federation.cohort_rate",
            str(federation.cohort_rate),
            "a fixed cohort",
            holds=False,
        )
        return
    if federation.selection == "by-size":  # one client may be drawn several times
        yield Verdict("min_clients", "federation.selection", "'by-size'", "another", holds=False)
        return
    if job.strategy.gives_steps:  # one that is late is merged alone
        expected = "another, whose rounds are of several clients"
        yield Verdict("min_clients", "strategy.name", repr(job.strategy.name), expected, holds=False)
        return
    fewest = math.ceil((federation.cohort or federation.clients) * federation.quorum)
    allowed = f"at least {policy.min_clients}"
    yield Verdict("min_clients", "cohort x quorum", str(fewest), allowed, fewest >= policy.min_clients)


def _privacy(policy: Policy, job: Job) -> Iterator[Verdict]:
    rules, units = policy.privacy, job.privacy.units
    for unit in rules.units:
        yield Verdict(
            "privacy.units",
            "privacy.unit",
            repr(job.privacy.unit),
            f"a promise to each {unit}",
            unit in units,
        )
    if rules.secure_sum:
        masked = uses_secure_aggregation(job)
        yield Verdict("privacy.secure_sum", "a secure sum", str(masked).lower(), "true", masked)
    limits = {"epsilon": rules.max_epsilon, "delta": rules.max_delta}
    for name, most in limits.items():
        if most is not None and not units:
            yield Verdict(
                f"privacy.max_{name}", "privacy.unit", "'none'", "a promise of privacy", holds=False
            )
    for unit in units:
        dp_plan = dp_plan_of(job, unit)
        assert dp_plan is not None, "a unit that is promised has terms"
        spent = epsilon(dp_plan.planned, dp_plan.delta) if limits["epsilon"] is not None else 0.0
        for (name, most), value in zip(limits.items(), (spent, dp_plan.delta), strict=True):
            if most is not None:
                key = f"the {name} of each {unit}"
                yield Verdict(f"privacy.max_{name}", key, f"{value:.4g}", f"at most {most:g}", value <= most)


def _epochs(policy: Policy, job: Job) -> Iterator[Verdict]:
    """A number of steps may be any number of epochs of a small shard."""
    most, train = policy.max_epochs, job.train
    if most is None:
        return
    if job.strategy.gives_steps:
        expected = f"another strategy, with train.epochs at most {most}"
        yield Verdict("max_epochs", "strategy.name", repr(job.strategy.name), expected, holds=False)
        return
    if train.steps is not None:
        expected = f"train.epochs, at most {most}"
        yield Verdict("max_epochs", "train.steps", str(train.steps), expected, holds=False)
        return
    yield Verdict("max_epochs", "train.epochs", str(train.epochs), f"at most {most}", train.epochs <= most)


RULES: tuple[Callable[[Policy, Job], Iterator[Verdict]], ...] = (
    _one_of("tasks", "task.name", lambda job: job.task.name),
    _one_of("backbones", "backbone.name", lambda job: job.backbone.name),
    _tuning,
    _one_of("strategies", "strategy.name", lambda job: job.strategy.name),
    _columns,
    _folders,
    _at_most("max_rounds", "federation.rounds", lambda job: job.federation.rounds),
    _epochs,
    _at_most("max_threads", "train.threads", lambda job: job.train.threads),
    _at_most("max_image_size", "backbone.image_size", lambda job: job.backbone.image_size),
    _min_clients,
    _download,
    _privacy,
)
