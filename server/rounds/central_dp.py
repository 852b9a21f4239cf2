"""Client-level differential privacy at the server: the strategy sees one noised sum per round and no more."""

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
"""The name, in the strategy's state, of the next round's clipping norm, where clipping is adaptive."""
SUMS, RELEASED = f"{SECRET}banded.sums", f"{SECRET}banded.released"
"""Names in a checkpoint: the last rounds' sums before noise and what was released, [rounds, numbers]."""


@dataclass(frozen=True)
class LedgerLocation:
    """The file of a ledger, and the fingerprint of the clients that it belongs to."""

    path: Path
    fingerprint: str


@dataclass
class CentralDp:
    """Charges the ledger for a round's release, then clips, sums and noises the round's updates.

    `run` identifies this run's charges in a ledger that several runs share. `correlation` holds the earlier
    rounds' sums, which banded noise needs; it is secret and stored in checkpoints only. `clients` is a hash
    of the run's client names, where banded noise binds the run to them.
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
        """The ledger, opened at the first use, so that a run that is refused creates no file.

        Raises:
            DataError: the file was tampered with, or belongs to other clients.
        """
        durable = not self.job.privacy.seeded_noise
        return Ledger.open(self.ledgers.path, self.ledgers.fingerprint, durable=durable)

    @property
    def spent(self) -> Counter[Release]:
        """All releases that this run was charged for, including those that a crash lost."""
        return self.ledger.spent_on(self.run)

    def check_budget(self, round: int) -> None:
        """Raises BudgetExhausted if this round's release would bring epsilon above the target."""
        if self._is_repeated(round) or self.dp_plan.within_budget(self.spent, 1, self._cost(round)):
            return
        raise BudgetExhausted(
            f"round {round}: its release would bring epsilon above the target {self.dp_plan.promise.epsilon}"
        )

    def check_clients(self, names: Sequence[str]) -> None:
        """For banded noise, bind the run to its clients, whose names decide in which rounds each takes part.

        Raises:
            ConfigError: there are too few clients for the bands, or the run was charged for other clients.
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
        """(one update with the noised mean, entries for the strategy's state such as the next clipping norm).

        The update's `delta` has the names and shapes of `model`, in float64.

        Raises:
            BudgetExhausted: the release would exceed the budget; nothing was released.
        """
        self.check_budget(round)
        norm = float(state.get(NORM, self.dp_plan.promise.clipping_norm))
        mechanism = replace(
            self._mechanism(round, norm),
            count_deviation=self.dp_plan.count_deviation,
            correlation=self.correlation,
        )
        mean, fraction = mechanism.release(updates, model)
        next_state: State = {}
        if fraction is not None:
            promise = self.dp_plan.promise
            next_state[NORM] = update_clipping_norm(
                norm, fraction, quantile=promise.quantile, lr=promise.clipping_lr
            )
        return Update("the cohort", round, mean, num_examples=1), next_state

    def privatize_statistics(
        self, round: int, by_client: Mapping[str, Tensors], form: Tensors, norm: float
    ) -> Tensors:
        """The noised sum of the clients' statistics, each clipped to the L2 norm `norm`.

        `form` has the names and shapes of the statistics; the sum is float64. Without any statistics it is
        noise alone.

        Raises:
            BudgetExhausted: the release would exceed the budget; nothing was released.
        """
        self.check_budget(round)
        statistics = [Update(name, round, by_client[name], num_examples=1) for name in sorted(by_client)]
        mean, _ = self._mechanism(round, norm).release(statistics, form)
        return {name: tensor * self.dp_plan.divisor for name, tensor in mean.items()}

    def _mechanism(self, round: int, norm: float) -> CentralGaussian:
        return CentralGaussian(
            clipping_norm=norm,
            noise_multiplier=self.dp_plan.noise_multiplier,
            expected_cohort=self.dp_plan.divisor,
            sampling_rate=self.dp_plan.event.sampling_rate,
            random_bits=self._random_bits_of("noise", round),
            record=lambda cost: self._charge(round, cost),
        )

    @property
    def state(self) -> State:
        """The secret entries that a checkpoint holds beside the strategy's state."""
        rows_by_name = {SUMS: self.correlation.sums, RELEASED: self.correlation.released}
        return {
            name: torch.stack([*map(torch.from_numpy, rows)]) for name, rows in rows_by_name.items() if rows
        }

    def resume(self, state: State) -> State:
        """Restore what `state` returned from a checkpoint's state; returns the other entries."""
        self.correlation.sums = _rows(state, SUMS)
        self.correlation.released = _rows(state, RELEASED)
        return {name: value for name, value in state.items() if name not in (SUMS, RELEASED)}

    @property
    def update_transforms(self) -> tuple[NoisedMean, ...]:
        """The transform that replaces a round's updates by their noised mean."""
        return (NoisedMean(self),)

    def uniforms(self, round: int) -> Callable[[int], torch.Tensor]:
        """A function that returns `sampling_uniforms` of this round for a count."""
        return partial(self.sampling_uniforms, round)

    def sampling_uniforms(self, round: int, count: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), [count], float64, from a source that only the server knows."""
        return torch.from_numpy(uniform(self._random_bits_of("cohort", round)(count)))

    def _random_bits_of(self, purpose: str, round: int) -> RandomBits:
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
        """Whether this release was charged before and repeats the same bytes, as seeded noise does."""
        return self.job.privacy.seeded_noise and self.ledger.has(self.run, round)


@dataclass(frozen=True)
class NoisedMean:
    """Replaces a round's updates by one: the clipped and noised mean, charged before its noise is drawn."""

    protection: CentralDp

    def __call__(
        self, updates: Sequence[Update], round: int, model: Tensors, state: State
    ) -> tuple[Sequence[Update], State]:
        mean, next_state = self.protection.privatize(round, updates, model, state)
        return [mean], next_state


@dataclass(frozen=True)
class NoProtection:
    """Stands for `CentralDp` in jobs without central noise: rounds cost nothing, updates are unchanged."""

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
    """The job's central privacy, or `NoProtection` where the server adds no noise.

    `ledgers` is the ledger to charge; None charges one in the run's directory `out`.

    Raises:
        ConfigError: no noise reaches the target epsilon.
    """
    dp_plan = dp_plan_of(job, "client")
    if dp_plan is None or dp_plan.where != "server":
        return NoProtection()
    return CentralDp(
        job, dp_plan, ledgers or LedgerLocation(out / "ledger.jsonl", job.hash), run_key(job, out)
    )


def run_key(job: Job, out: Path) -> str:
    """The run's identifier in ledgers: unchanged when the run is resumed, another for the job's next run."""
    return hashlib.sha256(f"{job.hash} {out.resolve()}".encode()).hexdigest()[:32]
