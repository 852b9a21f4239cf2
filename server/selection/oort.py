"""Oort (Lai et al. 2021): samples fast clients with large losses, and some that have sent nothing yet.

"Oort: Efficient Federated Learning via Guided Participant Selection", algorithm 1. Round R chooses K clients:

    exploitation  (1 - eps) K of the explored clients E, with probabilities proportional to Util(i)
    exploration   eps K of the other clients, with probabilities proportional to their speeds

    Util(i) = (U(i) / U_max + sqrt(0.1 log R / L(i))) (T / t_i)^(alpha 1[T < t_i])

U(i) is the statistical utility of i's last round, L(i) the number of that round, t_i its duration. Only
clients of E whose Util is at least c times the (1 - eps) K-th largest can be drawn. U is clipped at U_max,
its quantile `clip` over E, to bound the effect of outliers. eps starts at `explore`, is multiplied by
`explore_decay` after each round and never falls below `explore_least`. Clients slower than T are penalised
with the exponent alpha. The pacer compares, every W rounds, the utility of the last W rounds with that of the
W before; if it fell, Delta is added to T.
alpha is `penalty`, c `cutoff`, W `window`, T `seconds`, and Delta is `seconds_step` times the first T.

What differs here. The paper's U(i) = |B_i| sqrt(mean over B_i of Loss^2) needs the squared losses, but an
update carries the mean loss over all local steps. So U(i) = |B_i| max(0, mean Loss) with client i's training
examples B_i, which is smaller than the paper's where losses differ. As in the authors' program, U / U_max
puts both terms of Util on one scale. Time is virtual: t_i = n_i E_l / s_i with n_i examples, E_l =
`train.epochs` (with `train.steps`, that many batches instead of n_i E_l) and s_i the speed in examples per
second, which the job gives or its seed draws uniformly from 1 to `speed_spread`. No real clock is used, so
cohorts are the same on every machine. Clients aren't excluded for having taken part often.
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
"""Names in the state: prefixes of a client's U and L and of a round's sum of U; how often T was raised."""


@dataclass(frozen=True)
class Explored:
    """The explored clients: their indices, U, L and t in virtual seconds, [explored] each."""

    places: NDArray[np.int64]
    utilities: Numbers
    last_rounds: Numbers
    seconds: Numbers


def exploring(options: OortSection, round: int) -> float:
    """eps of a round: the fraction of its cohort drawn from clients that have sent nothing yet."""
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
    """The indices of `count` explored clients, drawn in proportion to Util among those above the cutoff.

    Fewer, where fewer are explored. `uniforms` are numbers in [0, 1), at least one per drawn client.
    """
    count = min(count, len(util))
    if count == 0:
        return []
    least = cutoff * float(np.sort(util)[len(util) - count])
    above = np.flatnonzero(util >= least)
    drawn = without_replacement(in_steps(util[above]), uniforms[:count])
    return [int(known.places[above[i]]) for i in drawn]


def shares(count: int, part: float, *, known: int, unknown: int) -> tuple[int, int]:
    """(number of explored clients, number of others) in a cohort of `count`, `part` of them others.

    If there aren't enough of one kind, the other kind fills the cohort up.

    >>> shares(10, 0.25, known=50, unknown=50), shares(10, 0.25, known=3, unknown=50)
    ((8, 2), (3, 7))
    """
    others = min(int(part * count), unknown)
    from_known = min(count - others, known)
    return from_known, min(count - from_known, unknown)


def loses_utility(totals: Mapping[int, float], round: int, window: int) -> bool:
    """Whether the last W rounds have less utility than the W before; False unless W divides the round."""
    if round % window or round < 2 * window:
        return False
    recent = sum(totals[r] for r in range(round - window + 1, round + 1))
    return recent < sum(totals[r] for r in range(round - 2 * window + 1, round - window + 1))


@dataclass(frozen=True)
class Oort:
    """Samples `count` clients a round by utility and speed; `sizes` are examples, in the order of `names`."""

    names: Sequence[str]
    sizes: Weights
    count: int
    train: TrainSection
    seed: int
    options: OortSection

    update_transforms: tuple[()] = ()

    @cached_property
    def speeds(self) -> Numbers:
        """Each client's speed in examples per virtual second, [clients]."""
        even = torch.rand(len(self.names), generator=stream(self.seed, "speed"), dtype=torch.float64)
        drawn: Numbers = 1 + (self.options.speed_spread - 1) * even.numpy()
        speeds = self.options.speeds or {}
        for name in speeds.keys() & self._places.keys():
            drawn[self._places[name]] = speeds[name]
        return drawn

    @cached_property
    def seconds(self) -> Numbers:
        """t of each client in virtual seconds, [clients]; a client without examples counts as having one."""
        seconds: Numbers = self.train.expected_examples_seen(np.maximum(self.sizes, 1)) / self.speeds
        return seconds

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def preferred_seconds(self, state: State) -> float:
        """T in virtual seconds: the job's or the median client's time, plus what the pacer has added."""
        first = self.options.seconds or float(np.median(self.seconds))
        return first * (1 + self.options.seconds_step * float(state.get(RELAXED, 0.0)))

    def explored(self, state: State) -> Explored:
        """The explored clients that take part in the run, in the order of their indices."""
        names = [name.removeprefix(UTILITY) for name in state if name.startswith(UTILITY)]
        here = sorted((self._places[name], name) for name in names if name in self._places)
        places = np.array([place for place, _ in here], dtype=np.int64)
        known = {kind: np.array([float(state[kind + name]) for _, name in here]) for kind in (UTILITY, LAST)}
        return Explored(places, known[UTILITY], known[LAST], self.seconds[places])

    def cohort(self, state: State, round: int) -> list[str]:
        """The names of the round's clients, sorted; the same for the same state and round."""
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
        """The state with the utilities of the round's clients, and with T raised if the pacer says so."""
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
    """Whether `name` is the utility sum of a round that the pacer no longer needs."""
    return name.startswith(TOTAL) and int(name.removeprefix(TOTAL)) <= round - 2 * window
