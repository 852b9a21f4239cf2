"""The trials of a search: what is tried next, and what is known of each, in SQLite inside the folder.

Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization" (TPE), by Optuna. A search with the same
seed tries the same settings, however often it was killed: trial n is drawn by a sampler of its own, whose
seed says n, and which knows the trials up to n minus as many as run at a time and no later ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.protocol.random_streams import stream_seed
from atoll.sim.search.space import Space, Texts, checked_job, values_of
from atoll.sim.sweep.grid import Base, Values
from atoll.system.durable_files import is_begun, replace_synced
from atoll.system.installed import is_installed
from atoll.tasks import check_task, headline_of
from atoll.tasks.metric_values import lower_is_better

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

FORMAT = 1
"""Of `tune.json`."""

STARTUP = 5
"""Trials before the sampler learns from what they found: drawn at random, far from each other."""

SPREAD = 20
"""Random draws of which such a trial is the one that is farthest from all before it (maximin)."""

DRAWS = 20
"""Draws of the sampler after which what hasn't been tried is looked for in another way."""

PLACE, OUTCOME = "place", "outcome"
"""What the storage keeps of a trial besides its values: when it was drawn, and what came of it."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: its value, or why it has none.

    `curve` has the metric after each measured round of the first seed; `refused` is what is wrong with such
    settings, `failed` what went wrong around them, which may go well another time.
    """

    value: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    stopped: int | None = None
    refused: str | None = None
    failed: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        table = json.loads(text)
        return cls(**{**table, "curve": {int(step): value for step, value in table["curve"].items()}})

    @property
    def reason(self) -> str:
        """Why there is no value."""
        if self.stopped is not None:
            return f"stopped after round {self.stopped}: worse than the others' median"
        return self.refused or self.failed or ""


@dataclass(frozen=True)
class TrialResult:
    """One trial: its place in the search from 0 on, its settings, and what became of it, if it has ended."""

    index: int
    number: int
    texts: Texts
    values: Values
    job: Job
    outcome: Outcome | None

    @property
    def folder(self) -> str:
        """The folder of its runs."""
        return f"trial-{self.index + 1:04d}"


@dataclass(frozen=True)
class Search:
    """One search of a space for the job's best variation; `at_once` trials run at a time."""

    path: Path
    base: Base
    space: Space
    seed: int
    seeds: int
    at_once: int
    first_settings: Texts | None

    @cached_property
    def metric(self) -> str:
        """What is judged by: the task's headline."""
        check_task(name := self.base.table["task"]["name"])
        return headline_of(name)

    @property
    def direction(self) -> str:
        return "minimize" if lower_is_better(self.metric) else "maximize"

    @cached_property
    def study(self) -> Study:
        """The trials in `study.db`; raises ConfigError where that is damaged."""
        from sqlalchemy.exc import SQLAlchemyError

        optuna, file = quiet_optuna(), self.path / "study.db"
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{file.absolute()}")
            study: Study = optuna.create_study(
                storage=storage, study_name="tune", direction=self.direction, load_if_exists=True
            )
        except SQLAlchemyError as error:
            why = str(error).splitlines()[0]
            raise ConfigError(f"{file}: damaged ({why}); choose another --out") from None
        return study

    def trials(self) -> list[TrialResult]:
        """All trials in the order of their places; of one that was tried twice the last time."""
        for trial in self.study.get_trials(deepcopy=False):
            if not trial.state.is_finished() and OUTCOME in trial.user_attrs:  # the kill came in between
                self._recorded(trial.number, Outcome.from_json(trial.user_attrs[OUTCOME]))
        by_place = {trial.user_attrs[PLACE]: trial for trial in self.study.get_trials(deepcopy=False)}
        return [self._tried(by_place[place]) for place in sorted(by_place)]

    def _tried(self, trial: FrozenTrial) -> TrialResult:
        texts = {
            one.key: one.text(trial.params[one.key]) for one in self.space.keys if one.key in trial.params
        }
        outcome = trial.user_attrs.get(OUTCOME)
        return TrialResult(
            trial.user_attrs[PLACE],
            trial.number,
            texts,
            values_of(self.space, texts),
            checked_job(self.base, texts),
            None if outcome is None else Outcome.from_json(outcome),
        )

    def next(self, tried: Sequence[TrialResult]) -> TrialResult | None:
        """The next trial, noted as begun; None where nothing is left to try."""
        texts = self._proposed(tried)
        return None if texts is None else self.begin(len(tried), texts)

    def begin(self, place: int, texts: Texts) -> TrialResult:
        """Note that a trial has begun, all of it or nothing."""
        from optuna.trial import TrialState, create_trial

        keys = [one for one in self.space.keys if one.key in texts]
        trial = create_trial(
            state=TrialState.RUNNING,
            params={one.key: one.param(texts[one.key]) for one in keys},
            distributions={one.key: one.distribution for one in keys},
            user_attrs={PLACE: place},
        )
        self.study.add_trial(trial)
        return self._tried(self.study.get_trials(deepcopy=False)[-1])

    def end(self, tried: TrialResult, outcome: Outcome) -> TrialResult:
        """Note what became of a trial. The outcome is written first: a kill in between loses nothing."""
        from optuna.trial import Trial

        frozen = self.study.get_trials(deepcopy=False)[tried.number]
        trial = Trial(self.study, frozen._trial_id)
        for step, value in outcome.curve.items():
            if step not in frozen.intermediate_values:
                trial.report(value, step)
        trial.set_user_attr(OUTCOME, json.dumps(vars(outcome)))
        return self._recorded(tried.number, outcome)

    def _recorded(self, number: int, outcome: Outcome) -> TrialResult:
        from optuna.trial import TrialState

        if outcome.failed is not None:
            self.study.tell(number, state=TrialState.FAIL)
        elif outcome.value is None:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, outcome.value)
        return self._tried(self.study.get_trials(deepcopy=False)[number])

    def _proposed(self, tried: Sequence[TrialResult]) -> Texts | None:
        """Settings that make a job nobody has tried: the job's own first, then the sampler's."""
        known = {one.job.hash for one in tried}
        if not tried and self.first_settings is not None:
            return self.first_settings
        invalid: list[str] = []
        if 0 < len(tried) < STARTUP:
            drawn = [self._sampled(tried, -1 - draw) for draw in range(SPREAD)]
            new = [texts for texts in drawn if self._is_new(texts, known, invalid)]
            if new:
                return max(new, key=lambda t: min(self.space.distance(t, one.texts) for one in tried))
        for draw in range(DRAWS):
            texts = self._sampled(tried, draw)
            if self._is_new(texts, known, invalid):
                return texts
        left = [t for t in self.space.combinations(self.base) if self._is_new(t, known, invalid)]
        if left:
            return left[stream_seed(self.seed, "tune", len(tried), "left") % len(left)]
        if not tried and invalid:
            raise ConfigError(f"no choice of the space makes a valid job: {invalid[0]}")
        return None

    def _is_new(self, texts: Texts, known: set[str], invalid: list[str]) -> bool:
        try:
            return checked_job(self.base, texts).hash not in known
        except ConfigError as error:
            invalid.append(str(error))
            return False

    def _sampled(self, tried: Sequence[TrialResult], draw: int) -> Texts:
        """What TPE makes of the trials that a trial at this place may know of."""
        optuna, place = quiet_optuna(), len(tried)
        sampler = optuna.samplers.TPESampler(
            seed=stream_seed(self.seed, "tune", place, draw) % 2**32,
            n_startup_trials=STARTUP,
            constant_liar=True,
        )
        study = optuna.create_study(direction=self.direction, sampler=sampler)
        study.add_trials(self._known_at(tried))
        trial = study.ask()
        return self.space.draw(self.base, lambda one: one.sample(trial))

    def _known_at(self, tried: Sequence[TrialResult]) -> list[FrozenTrial]:
        """The trials as the sampler sees them: those that may still run have no value yet."""
        from optuna.trial import TrialState, create_trial

        known, trials = [], self.study.get_trials(deepcopy=False)
        for one in tried:
            frozen = trials[one.number]
            if one.index <= len(tried) - self.at_once:
                if frozen.state != TrialState.FAIL:
                    known.append(frozen)
                continue
            known.append(
                create_trial(
                    state=TrialState.RUNNING, params=frozen.params, distributions=frozen.distributions
                )
            )
        return known

    def curves_before(self, place: int, tried: Sequence[TrialResult]) -> list[Mapping[int, float]]:
        """The curves of whole trials that one at this place is compared with."""
        return [
            one.outcome.curve
            for one in tried
            if one.index <= place - self.at_once and one.outcome and one.outcome.value is not None
        ]

    def may_begin(self, place: int, tried: Sequence[TrialResult]) -> bool:
        """Whether all that a trial at this place must know of has ended."""
        return all(one.outcome is not None for one in tried if one.index <= place - self.at_once)

    def ranked(self, tried: Sequence[TrialResult]) -> list[TrialResult]:
        """The trials that have a value, the best first; of equal ones that with the smaller loss."""
        sign = 1 if self.direction == "minimize" else -1

        def rank(one: TrialResult) -> tuple[float, float, int]:
            assert one.outcome is not None and one.outcome.value is not None
            loss = one.outcome.metrics.get("loss", math.inf)
            return sign * one.outcome.value, loss if math.isfinite(loss) else math.inf, one.index

        return sorted((t for t in tried if t.outcome and t.outcome.value is not None), key=rank)

    def importances(self, tried: Sequence[TrialResult]) -> dict[str, float]:
        """How much of the values' spread each key explains (fANOVA, Hutter et al. 2014), in all 1.

        Of the keys that all whole trials have; empty where there are too few of them, or all are equal.
        """
        optuna = quiet_optuna()
        ranked = self.ranked(tried)
        if len(ranked) < STARTUP or len({one.outcome.value for one in ranked if one.outcome}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=stream_seed(self.seed, "fanova") % 2**32)
        try:
            importances = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        except RuntimeError:  # fANOVA's trees found no variance to explain
            return {}
        return {key: float(share) for key, share in importances.items()}


@dataclass(frozen=True)
class SearchFolder:
    """Where a search lies, and what it says of itself in `tune.json`."""

    path: Path

    @property
    def about(self) -> Path:
        return self.path / "tune.json"

    def check(self, base: Base, space: Space, *, seed: int, seeds: int) -> None:
        """Raises ConfigError unless the folder is new, or empty, or of this very search."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: found a file, expected a folder; choose another --out")
        if self.about.is_file():
            self._same(self._table(base, space, seed, seeds))
        elif self.path.is_dir() and is_begun(self.path, self.about.name):
            raise ConfigError(f"{self.path}: not empty and no search's folder; choose another --out")

    def opened(self, base: Base, space: Space, *, seed: int, seeds: int, at_once: int) -> Search:
        """The search, begun or gone on with; one that was begun keeps how many run at a time."""
        about = self._table(base, space, seed, seeds)
        if self.about.is_file():
            at_once = self._same(about)
        else:
            replace_synced(self.about, json.dumps(about | {"at_once": at_once}, indent=2).encode())
        return Search(self.path, base, space, seed, seeds, at_once, space.settings_of(base))

    def _table(self, base: Base, space: Space, seed: int, seeds: int) -> dict[str, Any]:
        table = json.loads(json.dumps(base.table, default=str))
        return {"format": FORMAT, "job": table, "space": space.as_options, "seed": seed, "seeds": seeds}

    def _same(self, about: Mapping[str, Any]) -> int:
        try:
            known: dict[str, Any] = json.loads(self.about.read_text("utf-8"))
        except ValueError:
            known = {}
        if known.get("format") != FORMAT or not isinstance(known.get("at_once"), int):
            raise ConfigError(f"{self.about}: damaged, or of another version; choose another --out")
        changed = [key for key in about if known.get(key) != about[key]]
        if changed:
            raise ConfigError(
                f"{self.path}: holds a search with another {' and '.join(changed)}; choose another --out"
            )
        return int(known["at_once"])


def quiet_optuna() -> Any:
    """The library, imported when it is needed; it says nothing but warnings."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def check_optuna() -> None:
    """Raises ConfigError unless Optuna is installed, which only a search needs."""
    if not is_installed("optuna"):
        raise ConfigError("the package optuna is not installed; pip install 'atoll[tune]'")
