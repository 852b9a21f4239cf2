"""A run played again with canaries in it, by the code that played it, as an attacker sees it.

The rounds are those of `atoll.server.rounds`, the mechanisms those of the run: nothing is written anew here.
The noise is always real, even where the job asks for a seeded one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np

from atoll.client.dp.ledgers import PrivacyLedgers
from atoll.errors import ConfigError
from atoll.job.job import Job
from atoll.job.privacy import separation
from atoll.learning.learner import Learner
from atoll.privacy.auditing.epsilon_bounds import Membership, Vector
from atoll.privacy.dp_plan import DpPlan, dp_plan_of
from atoll.protocol.messages import Update
from atoll.protocol.requests import Request
from atoll.protocol.tensors import Tensors
from atoll.server.events import ignore_events
from atoll.server.rounds.aggregation import merge_updates, request_updates
from atoll.server.rounds.central_dp import NORM, central_dp_of
from atoll.server.rounds.cohort import sample
from atoll.server.rounds.run_state import Run
from atoll.server.rounds.start import start_or_resume
from atoll.server.run.directory import RunDirectory
from atoll.server.transport import Transport
from atoll.sim.population.devices import clock_of
from atoll.sim.population.population import Population
from atoll.strategies.strategy import State
from atoll.tasks import task_named

Progress = Callable[[], None]
"""Told after every round."""


@dataclass(frozen=True)
class RoundTranscript:
    """What an attacker has of one round.

    The models before and after, what the server was sent, and what its strategy was given: under a
    client's promise that is the noised mean alone, clipped at `clipping_norm`.
    """

    load_before: Tensors
    after: Tensors
    updates: Sequence[Update]
    released: Sequence[Update] = ()
    clipping_norm: float = 1.0


class Planted(Protocol):
    """What takes part in a run beside the clients' own data, or in its place."""

    def names(self, inside: Membership) -> list[str]:
        """Canary clients that cohorts are drawn from as well; none where examples are the canaries."""
        ...

    def carrier(self, inside: Membership) -> Transport:
        """To all clients, with the canaries among their data or their answers."""
        ...

    def joined(self, run: Run, updates: Sequence[Update], present: Sequence[str]) -> Sequence[Update]:
        """The round's updates with those of the canary clients that are present."""
        ...


class Canaries(Planted, Protocol):
    """Units of privacy that are in a run or not, each by a coin, and how an attacker tells."""

    @property
    def count(self) -> int: ...

    @property
    def what(self) -> str:
        """The attack in a few words."""
        ...

    @property
    def scores_are_sums(self) -> bool:
        """Whether a score is linear in the releases, so that it is Gaussian where their noise is."""
        ...

    def scores(self, seen: RoundTranscript, inside: Membership) -> Vector:
        """What one round says for each canary's being in; rounds add up.

        A canary's score must not depend on its own entry of `inside`: it is for what the others do.
        """
        ...


class NoLedgers(PrivacyLedgers):
    """Ledgers of a replay: it spends nothing, for nobody but the audit sees what it releases."""

    def charge(self, client: str, fingerprint: str, job: Job, dp_plan: DpPlan, request: Request) -> int:
        """As many rounds as there were: a replay is never interrupted."""
        return request.round


def fresh_learner(job: Job, population: Population) -> Learner:
    """What builds and measures the job's model, before training, with what the population's clients tell."""
    task = task_named(job.task.name)
    return Learner.of(job, task, task.merge_info(population.roster(job).data_info))


def job_to_replay(job: Job) -> Job:
    """The job with real noise, and without what only its result needs.

    Raises:
        ConfigError: the job has a teacher, whose answers to canaries nobody has asked for, or something else
            that canaries can't take part in.
    """
    if job.train.teacher is not None:
        raise ConfigError("train.teacher: a run with a teacher can't be attacked; expected one without")
    strategy = job.strategy
    has_own = strategy.keeps_client_state or strategy.keeps_last_model or strategy.makes_clusters
    own_state = strategy.name if has_own else None
    for key, value in (
        ("personal.keep", job.personal.keep),
        ("tune.head_init", job.tune.head_init),
        ("tune.then", [stage.method for stage in job.tune.then] or None),
        ("strategy.name", own_state),
        ("train.lr_schedule", job.train.lr_schedule),
        ("train.layer_decay", job.train.layer_decay),
        ("federation.selection", None if job.federation.selection == "uniform" else job.federation.selection),
    ):
        if value is not None:
            raise ConfigError(f"{key}: a run with it can't be attacked; expected none, found {value!r}")
    if separation(job) > 1:
        raise ConfigError(
            "privacy.mechanism: a run with 'banded' can't be attacked, for canaries take part in every round"
        )
    privacy = job.privacy.model_copy(update={"seeded_noise": False, "audit": False})
    evaluate = job.evaluate.model_copy(update={"baselines": (), "contributions": None})
    return job.model_copy(update={"privacy": privacy, "evaluate": evaluate})


def replayed(
    job: Job, population: Population, canaries: Canaries, inside: Membership, progress: Progress
) -> Vector:
    """Each canary's score over all rounds of one run that had those inside, [canaries]."""
    total = np.zeros(canaries.count)
    for seen in rounds_replayed(job, population, canaries, inside):
        total += canaries.scores(seen, inside)
        progress()
    return total


def rounds_replayed(
    job: Job, population: Population, planted: Planted, inside: Membership
) -> Iterator[RoundTranscript]:
    """What an attacker has of each round of one run that had those inside, one round after the other."""
    with TemporaryDirectory(prefix="atoll-audit-") as folder:
        out = Path(folder) / "run"
        with RunDirectory.open(out, job, resume=False, force=False) as directory:
            protection = central_dp_of(job, out, None)
            run = start_or_resume(
                job, planted.carrier(inside), directory, _without_test_set(population), ignore_events,
                resume=False, clock=clock_of(population), protection=protection,
            )  # fmt: skip
            run, released = _recording(run)
            for round in range(1, job.federation.rounds + 1):
                yield _round(run, round, planted, inside, released)


def _without_test_set(population: Population) -> Callable[[Learner], None]:
    def test_set(learner: Learner) -> None:
        if learner.trains_on_features:
            learner.features.keep(population.whole(learner), training=True)

    return test_set


@dataclass
class LastReleased:
    """An update transform that changes nothing and keeps what the strategy is given."""

    updates: Sequence[Update] = ()

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        self.updates = updates
        return updates, {}


def _recording(run: Run) -> tuple[Run, LastReleased]:
    """The run, with its last update transform followed by one that keeps what comes out."""
    released = LastReleased()
    transforms = (*run.setup.update_transforms, released)
    return replace(run, setup=replace(run.setup, update_transforms=transforms)), released


def _round(
    run: Run, round: int, planted: Planted, inside: Membership, released: LastReleased
) -> RoundTranscript:
    """A round without measuring and checkpoints."""
    cohort, present = _cohort(run, round, planted.names(inside))
    gathered, _ = request_updates(run, cohort, round)
    updates = planted.joined(run, gathered.updates, present)
    before, norm = run.state.tensors, clipping_norm_of(run)
    merge_updates(run, updates, round)
    run.state.round = round
    return RoundTranscript(before, run.state.tensors, updates, released.updates, norm)


def clipping_norm_of(run: Run) -> float:
    """What clients' updates are clipped at in the next round; 1 without a promise to them."""
    dp_plan = dp_plan_of(run.setup.job, "client")
    usual = 1.0 if dp_plan is None else dp_plan.promise.clipping_norm
    return float(run.state.strategy_state.get(NORM, usual))


def _cohort(run: Run, round: int, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the cohort, the canary clients beside it): by the same coins, or each where none are thrown.

    A cohort of fixed size is charged as if everybody were in it, so that is what canaries do.
    """
    uniforms = run.setup.protection.uniforms(round)
    if not names or run.setup.job.federation.cohort_rate is None:
        return sample(run.setup.population, run.setup.job, round, uniforms), list(names)
    drawn = sample([*run.setup.population, *names], run.setup.job, round, uniforms)
    new = set(names)
    return [name for name in drawn if name not in new], [name for name in drawn if name in new]
