"""What a search may change of a job: keys with their values or ranges, and the job that one choice makes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from atoll.errors import ConfigError
from atoll.job.federation import ASYNCHRONOUS
from atoll.job.job import Job
from atoll.job.section import Needs, default_of, needs_of
from atoll.job.toml import apply_override
from atoll.sim.search.distributions import Choice, Range
from atoll.sim.sweep.grid import Base, Grid, Values, as_value
from atoll.strategies import STRATEGIES, build_strategy, check_merging
from atoll.strategies.options import HOSTILE_OPTIONS, trusted_client
from atoll.tasks import task_named

Texts = Mapping[str, str]
"""What one trial has for each key that has a meaning in it, as it would be typed."""

FIXED = ("name", "seed", "task", "data", "privacy", "evaluate", "federation.clients", "train.device")
"""Keys and tables that decide what a trial is judged by, on whose data: the same in every trial."""

MAX_ENUMERATED = 100_000
"""Combinations up to which a space of lists is gone through to find what hasn't been tried."""


@dataclass(frozen=True)
class Space:
    """The keys that vary; one that hangs on another comes after it."""

    keys: tuple[Choice | Range, ...]

    @classmethod
    def of(cls, vary: Sequence[str], ranges: Sequence[str]) -> Space:
        """From the texts of --vary and --range.

        Raises:
            ConfigError: one of them has another form, is there twice, or may not vary.
        """
        lists = Grid.of(vary, 1).keys if vary else {}
        keys: list[Choice | Range] = [Choice(key, texts) for key, texts in lists.items()]
        for text in ranges:
            new = Range.of(text)
            if any(new.key == other.key for other in keys):
                raise ConfigError(f"--range {new.key}: found twice, expected one --vary or --range for it")
            keys.append(new)
        for one in keys:
            for fixed in FIXED:
                if one.key == fixed or one.key.startswith(f"{fixed}."):
                    raise ConfigError(
                        f"{one.key}: may not vary in a search, expected a key that leaves the clients' data"
                        " and what they measure as they are, such as train.lr"
                    )
        return cls(tuple(sorted(keys, key=lambda one: _depth(one.key))))

    @property
    def as_options(self) -> list[str]:
        """As it would be typed, an option for every key."""
        return [one.as_option for one in self.keys]

    def draw(self, base: Base, pick: Any) -> Texts:
        """`pick(key)` for every key that has a meaning beside those before it."""
        table, texts = copy.deepcopy(base.table), {}
        for one in self.keys:
            if has_meaning(one.key, table):
                texts[one.key] = pick(one)
                apply_override(table, f"{one.key}={texts[one.key]}", option="--vary")
        return texts

    def distance(self, texts: Texts, other: Texts) -> float:
        """How far two choices are from each other: the sum over keys, 1 for one that only one of them has."""
        total = 0.0
        for one in self.keys:
            if (one.key in texts) != (one.key in other):
                total += 1
            elif one.key in texts:
                total += one.distance(texts[one.key], other[one.key])
        return total

    def combinations(self, base: Base) -> Iterator[Texts]:
        """Every choice there is, each once; nothing where a range makes them countless, or too many."""
        lists = [one.texts for one in self.keys if isinstance(one, Choice)]
        if len(lists) < len(self.keys) or math.prod(len(texts) for texts in lists) > MAX_ENUMERATED:
            return
        seen = set()
        for values in product(*lists):
            combination = dict(zip((one.key for one in self.keys), values, strict=True))
            texts = self.draw(base, lambda one, combination=combination: combination[one.key])
            if (mark := json.dumps(texts, sort_keys=True)) not in seen:
                seen.add(mark)
                yield texts

    def settings_of(self, base: Base) -> Texts | None:
        """The job's own values as a choice of the space; None where one is none of its values."""
        table = job_of(base, {}).model_dump(mode="json")
        texts = self.draw(base, lambda one: _at(table, one.key))
        params = {one.key: one.param(texts[one.key]) for one in self.keys if one.key in texts}
        if any(param is None for param in params.values()):
            return None
        return {one.key: one.text(params[one.key]) for one in self.keys if one.key in texts}

    def check(self, base: Base) -> None:
        """Look at every value before anything runs, alone and beside the others' values.

        Raises:
            ConfigError, WeightsError: one of them makes no valid job whatever stands beside it.
        """
        from atoll.server.run.run_job import validate_job

        validate_job(job_of(base, {}))
        for one in self.keys:
            for text in one.ends:
                self._check_value(base, one, text)

    def _check_value(self, base: Base, one: Choice | Range, text: str) -> None:
        from atoll.server.run.run_job import validate_job

        beside: list[dict[str, str]] = [{}]
        beside += [{o.key: end} for o in self.keys if o.key != one.key for end in o.ends]
        complaint: ConfigError | None = None
        for others in beside:
            texts = {**others, one.key: text}
            table = copy.deepcopy(base.table)
            for key, value in texts.items():
                apply_override(table, f"{key}={value}", option="--vary")
            if not has_meaning(one.key, table):
                continue
            try:
                job = checked_job(base, texts)
            except ConfigError as error:
                complaint = complaint or error
                continue
            if one.key.startswith("backbone."):
                validate_job(job)
            return
        raise complaint or ConfigError(f"{one.key}: has no meaning in any trial, expected {_wanted(one.key)}")


def _at(table: Mapping[str, Any], key: str) -> str:
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else json.dumps(value)


def governing_keys(key: str) -> tuple[str, ...]:
    """The keys by whose values it is decided whether a key says anything.

    >>> governing_keys("train.momentum"), governing_keys("strategy.tau"), governing_keys("train.lr")
    (('train.optimizer',), ('strategy.name',), ())
    """
    needed = tuple(need.key for need in needs_of(Job, key))
    return ("strategy.name", *needed) if _is_of_a_strategy(key) else needed


def _is_of_a_strategy(key: str) -> bool:
    return key.startswith("strategy.") and key != "strategy.name"


def _depth(key: str) -> int:
    """How many keys stand above one, each governing the next."""
    return max((1 + _depth(above) for above in governing_keys(key)), default=0)


def _wanted(key: str) -> str:
    above = " or ".join(governing_keys(key))
    return f"another {above} in the job, or in --vary" if above else "another key"


def has_meaning(key: str, table: Mapping[str, Any]) -> bool:
    """Whether a key says anything in a job, which is still a table.

    A job refuses a key without a meaning: what it needs is declared in the job's tables, and what a strategy
    takes by the strategy.

    >>> has_meaning("tune.rank", {"tune": {"method": "lora"}}), has_meaning("tune.rank", {})
    (True, False)
    """
    if _is_of_a_strategy(key):
        section = table.get("strategy")
        name = section.get("name") if isinstance(section, dict) else None
        entry = STRATEGIES.get(name or "fedavg")
        last = key.removeprefix("strategy.")
        if not (last == "options" if entry is None else last in entry.accepted_keys):
            return False
    return all(_is_met(need, table) for need in needs_of(Job, key))


def _is_met(need: Needs, table: Mapping[str, Any]) -> bool:
    default = default_of(Job, need.key)
    value: Any = table
    for part in need.key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return need.is_met(default if value is None else value, value is not None and value != default)


def job_of(base: Base, texts: Texts) -> Job:
    """The job with these values; what it says beside a value that is no longer its own is left out.

    A server learning rate that was meant for FedAdam, say, is none for FedAvg.

    Raises:
        ConfigError: in one line, what is wrong with the key or its value.
    """
    table = copy.deepcopy(base.table)
    for key, text in texts.items():
        apply_override(table, f"{key}={text}", option="--vary")
    changed = {key for key in texts if _at(base.table, key) != _at(table, key)}
    keys = (f"{name}.{key}" for name, inner in base.table.items() if isinstance(inner, dict) for key in inner)
    for key in sorted(keys, key=_depth):
        above = changed.intersection(governing_keys(key))
        if key in texts or not above:
            continue
        if not has_meaning(key, table) or (_is_of_a_strategy(key) and "strategy.name" in above):
            section, _, name = key.partition(".")
            table[section].pop(name)
            changed.add(key)
    return Job.parse(table, origin=base.origin, folder=base.folder)


def checked_job(base: Base, texts: Texts) -> Job:
    """`job_of`, with all that can be said without data or weights.

    Raises:
        ConfigError: there is no such job.
    """
    from atoll.learning.compatibility import check_fits

    job = job_of(base, texts)
    check_merging(job)
    build_strategy(job.strategy, job.federation, job.train, job.seed)
    check_fits(job, task_named(job.task.name))
    return job


def values_of(space: Space, texts: Texts) -> Values:
    """What a trial has for each key; None for one that has no meaning in it."""
    return {one.key: as_value(texts[one.key]) if one.key in texts else None for one in space.keys}


def check_searchable(job: Job) -> None:
    """Raises ConfigError where a search would break a promise, or has nothing to judge by."""
    if job.privacy.units:
        raise ConfigError(
            "privacy.unit: a search chooses by what clients measure on data that is promised privacy;"
            f" expected 'none', found {job.privacy.unit!r} (docs/sweep.md tells what such a choice spends)"
        )
    if not job.data.keeps_back:
        raise ConfigError(
            "data.validation_fraction: clients keep nothing back to judge by; expected above 0, found 0"
        )
    if job.evaluate.every > job.federation.rounds:
        raise ConfigError(
            f"evaluate.every: no round of {job.federation.rounds} is measured; expected at most that many,"
            f" found {job.evaluate.every}"
        )


def default_space(job: Job) -> Space:
    """What is searched where nothing is said: what mostly decides, for the job's way of tuning.

    A head on a frozen backbone is a convex problem that takes large steps; what tunes the backbone
    takes small ones. The server's strategy varies where it is one of Atoll's own that trusts all clients.
    """
    method, is_sgd = job.tune.method, job.train.optimizer == "sgd"
    batches = sorted({16, 64, job.train.batch_size})
    vary = [f"train.batch_size={','.join(map(str, batches))}"] if job.train.accumulate == 1 else []
    if method == "head" and task_named(job.task.name).uses_pooled_features:
        epochs = "train.epochs=1,2,4"
        ranges = ["train.lr=0.01..3,log" if is_sgd else "train.lr=0.0003..0.1,log"]
    elif method == "seeds":
        epochs, ranges = "train.epochs=1,2", ["train.lr=0.00001..0.01,log"]
    else:
        epochs = "train.epochs=1,2"
        ranges = ["train.lr=0.001..0.3,log" if is_sgd else "train.lr=0.00003..0.01,log"]
    vary += [epochs] if job.train.steps is None and not job.strategy.gives_steps else []
    if method == "lora":
        vary.append("tune.rank=4,8,16")
    if method == "last-k":
        vary.append("tune.layers=1,2")
    trusts_all = job.strategy.name not in HOSTILE_OPTIONS and trusted_client(job) is None
    alone = job.strategy.name in (*ASYNCHRONOUS, "signsgd")  # others don't go with what they need
    if STRATEGIES.has(job.strategy.name) and trusts_all and not alone:
        vary.append("strategy.name=fedavg,fedavgm,fedadam")
    if job.train.weight_decay == 0 and not is_sgd:
        vary.append("train.weight_decay=0.0,0.01")
    return Space.of(vary, ranges)
