"""Client-level privacy in the rounds: the strategy never sees more than one noised sum a round."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.errors import BudgetExhausted, ConfigError
from atoll.job.job import Job
from atoll.privacy.accounting import Release
from atoll.privacy.adaptive_clipping import update_clipping_norm
from atoll.privacy.banded import CorrelatedNoise
from atoll.privacy.central import CentralGaussian
from atoll.privacy.dp_plan import DpPlan, dp_plan_of
from atoll.privacy.ledger import Entry, Ledger
from atoll.privacy.noise import RandomBits, entropy, seeded, uniform
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream_seed
from atoll.protocol.tensors import Tensors
from atoll.server.run.checkpoint import SECRET
from atoll.strategies.strategy import State

NORM = "privacy.clipping_norm"
"""In the strategy's state: the clipping norm of the next round, where it adapts."""
SUMS, RELEASED = f"{SECRET}banded.sums", f"{SECRET}banded.released"
"""In a checkpoint: the last rounds' sums without noise, and what was released of them, [rounds, numbers]."""


@dataclass(frozen=True)
class LedgerLocation:
    """Where the charges of runs on the same clients are written down, and what binds them to those."""

    path: Path
    fingerprint: str


@dataclass
class CentralDp:
    """Clips, sums and noises the updates of a round, and charges the ledger for it first.

    `run` tells this run's charges from those of other runs in one ledger. `correlation` is what noise of
    several bands needs of earlier rounds: checkpoints hold it, and nothing else may.
    """

    job: Job
    dp_plan: DpPlan
    ledgers: LedgerLocation
    run: str
    observed: Counter[Release] = field(default_factory=Counter)
    correlation: CorrelatedNoise = field(init=False)
    clients: str = ""

    def __post_init__(self) -> None:
        self.correlation = CorrelatedNoise(self.dp_plan.bands)

    @cached_property
    def ledger(self) -> Ledger:
        """Opened when first needed: a run that is refused leaves none behind.

        Raises:
            DataError: it was changed, or is of other clients.
        """
        durable = not self.job.privacy.seeded_noise
        return Ledger.open(self.ledgers.path, self.ledgers.fingerprint, durable=durable)

    @cached_property
    def _count_deviation(self) -> float | None:
        """Andrew et al. 2021, section 3.1, take a twentieth of the cohort."""
        promise = self.dp_plan.promise
        if promise.clipping == "fixed":
            return None
        usual = max(self.dp_plan.divisor / 20, self.dp_plan.noise_multiplier)
        return promise.count_deviation or usual

    @property
    def spent(self) -> Counter[Release]:
        """What this run was charged, also for releases that a crash lost."""
        return self.ledger.spent_on(self.run)

    def check_budget(self, round: int) -> None:
        """Raises BudgetExhausted if this round's release would spend more than the target."""
        if self._is_repeated(round) or self.dp_plan.within_budget(self.spent, 1, self._cost(round)):
            return
        raise BudgetExhausted(
            f"round {round}: its release would bring epsilon above the target {self.dp_plan.promise.epsilon}"
        )

    def check_clients(self, names: Sequence[str]) -> None:
        """Take note of all clients of the run, by whose names it is known whose rounds lie how far apart.

        Raises:
            ConfigError: rounds must lie apart, and there are too few, or a round was charged for others.
        """
        if self.dp_plan.bands == 1 or self.clients:
            return
        needed = self.dp_plan.bands * int(self.dp_plan.divisor)
        if len(names) < needed:
            raise ConfigError(
                f"privacy.bands: {self.dp_plan.bands} rounds in a row need {needed} different clients,"
                f" {len(names)} take part; expected fewer bands, or a smaller federation.cohort"
            )
        clients = hashlib.sha256("\n".join(names).encode()).hexdigest()
        if self.ledger.data_of(self.run) - {clients}:
            raise ConfigError(
                "cannot resume: clients have joined or left, and with privacy.mechanism = 'banded' names"
                " say which rounds each takes part in; expected the clients that the run began with"
            )
        self.clients = clients

    def privatize(
        self, round: int, updates: Sequence[Update], model: Tensors, state: State
    ) -> tuple[Update, State]:
        """(one update that stands for all of them, what is kept for the next round).

        Raises:
            BudgetExhausted: the release would overspend; nothing was released.
        """
        self.check_budget(round)
        norm = float(state.get(NORM, self.dp_plan.promise.clipping_norm))
        mechanism = replace(
            self._mechanism(round, norm), count_deviation=self._count_deviation, correlation=self.correlation
        )
        mean, fraction = mechanism.release(updates, model)
        kept: State = {}
        if fraction is not None:
            promise = self.dp_plan.promise
            kept[NORM] = update_clipping_norm(
                norm, fraction, quantile=promise.quantile, lr=promise.clipping_lr
            )
        return Update("the cohort", round, mean, num_examples=1), kept

    def privatize_statistics(
        self, round: int, by_client: Mapping[str, Tensors], form: Tensors, norm: float
    ) -> Tensors:
        """The sum of the clients' statistics, each clipped to the norm, with noise; alike if none came.

        Raises:
            BudgetExhausted: the release would overspend; nothing was released.
        """
        self.check_budget(round)
        given = [Update(name, round, by_client[name], num_examples=1) for name in sorted(by_client)]
        mean, _ = self._mechanism(round, norm).release(given, form)
        return {name: tensor * self.dp_plan.divisor for name, tensor in mean.items()}

    def _mechanism(self, round: int, norm: float) -> CentralGaussian:
        return CentralGaussian(
            clipping_norm=norm,
            noise_multiplier=self.dp_plan.noise_multiplier,
            expected_cohort=self.dp_plan.divisor,
            sampling_rate=self.dp_plan.event.sampling_rate,
            random_bits=self._words("noise", round),
            record=lambda cost: self._charge(round, cost),
        )

    @property
    def state(self) -> State:
        """What a checkpoint must hold beside the strategy's state."""
        kept = {SUMS: self.correlation.sums, RELEASED: self.correlation.released}
        return {name: torch.stack([*map(torch.from_numpy, rows)]) for name, rows in kept.items() if rows}

    def resume(self, state: State) -> State:
        """Take back what `state` said; what is left is others'."""
        self.correlation.sums = _rows(state, SUMS)
        self.correlation.released = _rows(state, RELEASED)
        return {name: value for name, value in state.items() if name not in (SUMS, RELEASED)}

    @property
    def update_transforms(self) -> tuple[NoisedMean, ...]:
        """What happens to a round's updates before the strategy sees them."""
        return (NoisedMean(self),)

    def uniforms(self, round: int) -> Callable[[int], torch.Tensor]:
        """What cohorts are sampled by: `uniforms` of this round."""
        return partial(self.sampling_uniforms, round)

    def sampling_uniforms(self, round: int, count: int) -> torch.Tensor:
        """A uniform number for each client, which nobody else can know, [count]."""
        return torch.from_numpy(uniform(self._words("cohort", round)(count)))

    def _words(self, purpose: str, round: int) -> RandomBits:
        if self.job.privacy.seeded_noise:
            return seeded(stream_seed(self.job.seed, purpose, round))
        return entropy

    def _charge(self, round: int, cost: Release) -> None:
        with self.ledger.alone():
            self.check_budget(round)
            if self.dp_plan.bands > 1:
                cost = self._cost(round)
            if not self._is_repeated(round):
                self.ledger.charge(Entry(self.run, round, "client", cost, data=self.clients))
        self.observed[cost] += 1

    def _cost(self, round: int) -> Release:
        return self.dp_plan.cost_of_round(self.ledger.rounds_of(self.run), round)

    def _is_repeated(self, round: int) -> bool:
        """Whether this is byte for byte a release that was charged already, as seeded noise makes it."""
        return self.job.privacy.seeded_noise and self.ledger.has(self.run, round)


@dataclass(frozen=True)
class NoisedMean:
    """A round's updates become one: the clipped and noised mean, charged before its noise is drawn."""

    protection: CentralDp

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        mean, kept = self.protection.privatize(round, updates, model, state)
        return [mean], kept


@dataclass(frozen=True)
class NoProtection:
    """No promise to clients that the server keeps: rounds cost nothing, updates merge as they are."""

    update_transforms: tuple[NoisedMean, ...] = ()

    @property
    def state(self) -> State:
        return {}

    def resume(self, state: State) -> State:
        return state

    def check_budget(self, round: int) -> None:
        """Any round may be run."""

    def check_clients(self, names: Sequence[str]) -> None:
        """Any clients may take part."""

    def uniforms(self, round: int) -> None:
        """Cohorts are sampled from the job's own stream."""


def _rows(state: Mapping[str, torch.Tensor | float], name: str) -> list[NDArray[np.float64]]:
    return list(cast(torch.Tensor, state[name]).numpy()) if name in state else []


def central_dp_of(job: Job, out: Path, ledgers: LedgerLocation | None) -> CentralDp | NoProtection:
    """What keeps a job's promise to clients, if it makes one; charged to the run's own books by default.

    Raises:
        ConfigError: the promise can't be kept with any noise.
    """
    dp_plan = dp_plan_of(job, "client")
    if dp_plan is None or dp_plan.where != "server":
        return NoProtection()
    return CentralDp(
        job, dp_plan, ledgers or LedgerLocation(out / "ledger.jsonl", job.hash), run_key(job, out)
    )


def run_key(job: Job, out: Path) -> str:
    """What a run is called in ledgers: the same when it is resumed, another for the job's next run."""
    return hashlib.sha256(f"{job.hash} {out.resolve()}".encode()).hexdigest()[:32]
