"""Clients whose losses are large and who are fast, and some that nobody knows yet (Lai et al. 2021, Oort).

"Oort: Efficient Federated Learning via Guided Participant Selection", algorithm 1. Round R chooses K clients:

    exploitation  (1 - eps) K of the explored clients E, each with chance in proportion to Util(i)
    exploration   eps K of the others, each with chance in proportion to its speed

    Util(i) = (U(i) / U_max + sqrt(0.1 log R / L(i))) (T / t_i)^(alpha 1[T < t_i])

U(i) is the statistical utility of i's last round, L(i) the number of that round, t_i its time. Only those
of E are drawn from whose Util is at least c times the (1 - eps) K-th largest. U is clipped at its quantile
`clip` over E, U_max, so that one outlier doesn't decide. eps begins with `explore`, is multiplied by
`explore_decay` after each round and never falls below `explore_least`. T is the time from which the penalty
alpha counts; the pacer looks every W rounds whether the last W brought less utility than the W before, and
then adds Delta to T.
alpha is `penalty`, c `cutoff`, W `window`, T `seconds`, and Delta is `seconds_step` times the first T.

What differs here. The paper's U(i) = |B_i| sqrt(mean over B_i of Loss^2) needs the losses' squares. An update
brings their mean over all local steps, so U(i) = |B_i| max(0, mean Loss) with client i's training examples
B_i, which is less than the paper's where losses differ. Both terms of Util are on one scale by U / U_max,
as in the authors' program. Time is virtual: t_i = n_i E_l / s_i with n_i examples, E_l `train.epochs` (with
`train.steps` so many batches in the place of n_i E_l) and s_i the speed in examples a second, which the job
gives or its seed draws evenly from 1 to `speed_spread`. No clock is looked at, so cohorts are the same
everywhere. Nobody is barred for having taken part often.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from atoll.job.federation import OortSection
from atoll.job.train import TrainSection
from atoll.protocol.messages import Update
from atoll.protocol.random_streams import stream
from atoll.server.selection.proportional import Weights, in_steps, uniforms_of, without_replacement
from atoll.strategies.mean import example_counts, mean_losses
from atoll.strategies.strategy import State

Numbers = NDArray[np.float64]

UTILITY, LAST, TOTAL, RELAXED = "utility.", "last.", "total.", "relaxed"
"""In the state: before a client's name, its U and L; before a round's number, its sum of U; and how often the
pacer has relaxed T."""


@dataclass(frozen=True)
class Explored:
    """What is known of the explored clients: their places, U, L and t, [explored] each."""

    places: NDArray[np.int64]
    utilities: Numbers
    last_rounds: Numbers
    seconds: Numbers


def exploring(options: OortSection, round: int) -> float:
    """eps of a round: the part of its cohort that hasn't been heard of."""
    return max(options.explore_least, options.explore * options.explore_decay ** (round - 1))


def utilities(known: Explored, options: OortSection, round: int, preferred: float) -> Numbers:
    """Util of each explored client, [explored]; `preferred` is T in virtual seconds."""
    if not len(known.places):
        return np.zeros(0)
    bound = float(np.quantile(known.utilities, options.clip))
    statistical = np.minimum(known.utilities, bound) / bound if bound > 0 else np.zeros(len(known.places))
    uncertainty = np.sqrt(0.1 * math.log(round) / known.last_rounds)
    slower = np.minimum(preferred / known.seconds, 1.0)
    total: Numbers = (statistical + uncertainty) * slower**options.penalty
    return total


def exploited(
    known: Explored, util: Numbers, count: int, cutoff: float, uniforms: Sequence[float]
) -> list[int]:
    """The places of `count` explored clients, by chances in proportion to Util among those above the cut."""
    count = min(count, len(util))
    if count == 0:
        return []
    least = cutoff * float(np.sort(util)[len(util) - count])
    above = np.flatnonzero(util >= least)
    drawn = without_replacement(in_steps(util[above]), uniforms[:count])
    return [int(known.places[above[i]]) for i in drawn]


def shares(count: int, part: float, *, known: int, unknown: int) -> tuple[int, int]:
    """(how many explored clients, how many others) make a cohort; where one kind runs out, more of the other.

    >>> shares(10, 0.25, known=50, unknown=50), shares(10, 0.25, known=3, unknown=50)
    ((8, 2), (3, 7))
    """
    others = min(int(part * count), unknown)
    from_known = min(count - others, known)
    return from_known, min(count - from_known, unknown)


def loses_utility(totals: Mapping[int, float], round: int, window: int) -> bool:
    """Whether the last W rounds brought less utility than the W before; looked at every W rounds."""
    if round % window or round < 2 * window:
        return False
    recent = sum(totals[r] for r in range(round - window + 1, round + 1))
    return recent < sum(totals[r] for r in range(round - 2 * window + 1, round - window + 1))


@dataclass(frozen=True)
class Oort:
    """The rule for the clients of a run, in the order of their names; `sizes` are their examples."""

    names: Sequence[str]
    sizes: Weights
    count: int
    train: TrainSection
    seed: int
    options: OortSection

    update_transforms: tuple[()] = ()

    @cached_property
    def speeds(self) -> Numbers:
        """Examples a virtual second of each client, [clients]."""
        even = torch.rand(len(self.names), generator=stream(self.seed, "speed"), dtype=torch.float64)
        drawn: Numbers = 1 + (self.options.speed_spread - 1) * even.numpy()
        speeds = self.options.speeds or {}
        for name in speeds.keys() & self._places.keys():
            drawn[self._places[name]] = speeds[name]
        return drawn

    @cached_property
    def seconds(self) -> Numbers:
        """t of each client, [clients], of one with no examples as of one example."""
        seconds: Numbers = self.train.expected_examples_seen(np.maximum(self.sizes, 1)) / self.speeds
        return seconds

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def preferred_seconds(self, state: State) -> float:
        """T: as the job says it or the median client's, and what the pacer has added."""
        first = self.options.seconds or float(np.median(self.seconds))
        return first * (1 + self.options.seconds_step * float(state.get(RELAXED, 0.0)))

    def explored(self, state: State) -> Explored:
        """The explored clients that take part in the run, in the order of their places."""
        names = [name.removeprefix(UTILITY) for name in state if name.startswith(UTILITY)]
        here = sorted((self._places[name], name) for name in names if name in self._places)
        places = np.array([place for place, _ in here], dtype=np.int64)
        known = {kind: np.array([float(state[kind + name]) for _, name in here]) for kind in (UTILITY, LAST)}
        return Explored(places, known[UTILITY], known[LAST], self.seconds[places])

    def cohort(self, state: State, round: int) -> list[str]:
        """As in the seam."""
        known, options = self.explored(state), self.options
        speeds = in_steps(self.speeds) * (self.sizes > 0)
        speeds[known.places] = 0
        from_known, others = shares(
            self.count,
            exploring(options, round),
            known=len(known.places),
            unknown=int(np.count_nonzero(speeds)),
        )
        util = utilities(known, options, round, self.preferred_seconds(state))
        uniforms = uniforms_of(self.seed, "oort", round, from_known + others)
        chosen = exploited(known, util, from_known, options.cutoff, uniforms[:from_known])
        chosen += without_replacement(speeds, uniforms[from_known:])
        return [self.names[place] for place in sorted(chosen)]

    def after_round(self, state: State, updates: Sequence[Update], round: int) -> State:
        """As in the seam: the utilities of the round's clients, and whether the pacer relaxes T."""
        losses = mean_losses(updates) if updates else {}
        examples = dict(zip(losses, example_counts(updates), strict=True))
        gains = {name: examples[name] * max(loss, 0.0) for name, loss in losses.items()}
        fresh: State = {UTILITY + name: value for name, value in gains.items()}
        fresh |= {LAST + name: float(round) for name in gains}
        fresh[TOTAL + str(round)] = sum(gains.values())
        window = self.options.window
        after = {name: value for name, value in (state | fresh).items() if not _is_old(name, round, window)}
        totals = {
            int(name.removeprefix(TOTAL)): float(v) for name, v in after.items() if name.startswith(TOTAL)
        }
        if loses_utility(totals, round, window):
            after[RELAXED] = float(after.get(RELAXED, 0.0)) + 1
        return after


def _is_old(name: str, round: int, window: int) -> bool:
    """Whether it is a round's sum that the pacer doesn't look at any more."""
    return name.startswith(TOTAL) and int(name.removeprefix(TOTAL)) <= round - 2 * window
