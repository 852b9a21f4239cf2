"""The epsilon of a run, computed from the releases that were recorded where noise was drawn.

dp-accounting's PLD accountant computes it, on a grid refined until epsilon is stable to 0.1 %; its RDP
accountant gives a looser bound by another method. Poisson sampling is the only sampling with amplification
here: a cohort of fixed size is charged as if everybody took part
(google/differential-privacy #378: dp-accounting's bound for sampling without replacement is too low).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Relation = Literal["add-or-remove-one", "replace-one"]

STABLE = 1e-3
"""The relative change of epsilon between two grids below which no finer grid is tried."""
FINE = 0.1
"""The widest grid, as a part of epsilon, that may end the search: two that are wider can agree by chance."""
GRIDS = (0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)
"""Widths of the grid of privacy losses; all give upper bounds, and wide ones suffice for a large epsilon."""
USUAL_GRID = 1e-3
"""The grid whose curve is shown, and the widest that may call an epsilon infinite."""
UNREACHABLE = 1e4
"""Epsilon above which a guarantee is meaningless and reported as infinite."""
PRECISION = 1.001
"""The precision of a calibrated noise multiplier: divided by this factor it would be too small."""
DISCRETE_PART = 1 - 2.0**-50
"""The part of a noise multiplier that counts: discrete noise costs at most what this part of continuous does.

On a grid as fine as `noise.Lattice`'s, for 1e12 numbers, and up to 2e-30 of epsilon (`discrete_accounting`).
"""
LEAST_NOISE = 0.02
"""The noise multiplier below which epsilon, which is above 1,000, is reported as infinite too."""


@dataclass(frozen=True, order=True)
class Release:
    """One Gaussian release of a sum: its noise multiplier and the Poisson rate it was sampled at.

    The multiplier is the noise's deviation over the sum's sensitivity, that is over the clipping norm
    for neighbours that differ by adding or removing one unit. A rate of 1 means no sampling.
    """

    noise_multiplier: float
    sampling_rate: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise_multiplier must be finite and > 0, got {self.noise_multiplier}")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")


Composition = Mapping[Release, int]
"""How many times each kind of release was made."""


def epsilon(spent: Composition, delta: float, relation: Relation = "add-or-remove-one") -> float:
    """Epsilon at `delta` of all the releases together, by PLD: at least 0, and infinite above `UNREACHABLE`.

    `delta` is the allowed probability of failure and `relation` the neighbouring relation. The result is an
    upper bound, the least of several grids', of which the last two differ by at most 0.1 %.

    Raises:
        ValueError: delta is not in (0, 1).
    """
    _check_delta(delta)
    return _epsilon(_frozen(spent), delta, relation)


def epsilon_rdp(spent: Composition, delta: float, relation: Relation = "add-or-remove-one") -> float:
    """As `epsilon`, by Rényi divergences (RDP): a looser bound from another implementation."""
    _check_delta(delta)
    return _epsilon_rdp(_frozen(spent), delta, relation)


@lru_cache(maxsize=1024)
def _epsilon_rdp(spent: Frozen, delta: float, relation: Relation) -> float:
    return _sane(rdp_accountant(dict(spent), relation).get_epsilon(delta)) if spent else 0.0


def rdp_accountant(spent: Composition, relation: Relation = "add-or-remove-one"):  # type: ignore[no-untyped-def]
    """dp-accounting's accountant of Rényi divergences, with all the releases in it."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=_neighbours(relation))
    for release, count in spent.items():
        accountant.compose(_event(release), count)
    return accountant


def profile(spent: Composition, epsilons: Sequence[float]) -> list[float]:
    """Upper bounds of delta for all the releases together, at each of the `epsilons`, by PLD on one grid."""
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(_neighbours("add-or-remove-one"), USUAL_GRID)
    for release, count in spent.items():
        accountant.compose(_event(release), count)
    return [float(delta) for delta in accountant.get_delta(list(epsilons))]


def within(spent: Composition, delta: float, budget: float, relation: Relation = "add-or-remove-one") -> bool:
    """Whether epsilon at `delta` of all the releases together is at most `budget`.

    Every grid gives an upper bound, so the first coarse grid that stays within the budget decides.
    """
    _check_delta(delta)
    frozen = _frozen(spent)
    if any(release.noise_multiplier < LEAST_NOISE for release, _ in frozen):
        return False
    if not frozen or any(_on_grid(frozen, delta, relation, grid) <= budget for grid in GRIDS[:2]):
        return True
    return _epsilon(frozen, delta, relation) <= budget


def calibrate(
    target_epsilon: float,
    *,
    delta: float,
    sampling_rate: float,
    releases: int,
    relation: Relation = "add-or-remove-one",
) -> float:
    """The smallest noise multiplier, to 0.1 %, with which all releases together stay within `target_epsilon`.

    There are `releases` Gaussian releases, each at the Poisson rate `sampling_rate`.

    Raises:
        ValueError: the target isn't positive and finite, or no noise below 1e6 reaches it.
    """
    _check_delta(delta)
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"target epsilon must be finite and > 0, got {target_epsilon}")
    return _calibrate(target_epsilon, delta, sampling_rate, releases, relation)


@lru_cache(maxsize=256)
def _calibrate(target: float, delta: float, rate: float, releases: int, relation: Relation) -> float:
    def spent(noise: float) -> Frozen:
        return ((Release(noise, rate), releases),)

    def suffices(noise: float) -> bool:
        return _suffices(spent(noise), delta, target, relation)

    low, high = LEAST_NOISE, 1.0
    while not suffices(high):
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"no noise multiplier below 1e6 reaches epsilon {target} at delta {delta}")
    # From above, for little noise takes long to compute.
    while high / 2 > low and suffices(high / 2):
        high /= 2
    low = max(low, high / 2)
    if suffices(low):
        return low
    while high / low > 1.05:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if suffices(middle) else (middle, high)
    grid = _refined(spent(low), delta, relation)[1]
    if rate == 1 or _on_grid(spent(high), delta, relation, grid) > target:
        return _narrowed(low, high, target, lambda noise: _epsilon(spent(noise), delta, relation))
    return _narrowed(low, high, target, lambda noise: _on_grid(spent(noise), delta, relation, grid))


def _suffices(spent: Frozen, delta: float, target: float, relation: Relation) -> bool:
    """Whether epsilon is at most `target`: never said wrongly, and denied without looking closer than needed.

    From grid to grid the bound falls by 0.6 of what it fell by before at most (measured; the widths of grids
    fall by factors of 3). So a bound that is above the target by twice what it last fell by stays above.
    """
    for grid, value, fell in _bounds(spent, delta, relation):
        if value <= target:
            return True
        if grid <= FINE * value and value - 2 * fell > target:
            return False
    return False


def _narrowed(low: float, high: float, target: float, epsilon_at: Callable[[float], float]) -> float:
    """The upper end of a bracket of 0.1 % with epsilon_at(low) > target >= epsilon_at(high).

    Between close ends log epsilon is nearly linear in log noise, so two trials around the line's solution
    close the bracket.
    """
    above, below = epsilon_at(low), epsilon_at(high)
    while high / low > PRECISION:
        part = math.log(above / target) / math.log(above / max(below, 1e-9))
        guess = low * (high / low) ** part * PRECISION**0.4
        for trial in (guess, guess / PRECISION):
            if not low < trial < high:
                trial = math.sqrt(low * high)
            value = epsilon_at(trial)
            if value <= target:
                high, below = trial, value
            else:
                low, above = trial, value
    return high


Frozen = tuple[tuple[Release, int], ...]


def _frozen(spent: Composition) -> Frozen:
    kinds = sorted((release, count) for release, count in spent.items() if count > 0)
    plain = [(release, count) for release, count in kinds if release.sampling_rate == 1]
    if len(plain) < 2:
        return tuple(kinds)
    return tuple(sorted([*(kind for kind in kinds if kind not in plain), (_as_one(plain), 1)]))


def _as_one(plain: Sequence[tuple[Release, int]]) -> Release:
    """The one release that costs as much as all of these without sampling (Dong, Roth and Su 2022)."""
    squares = (count / release.noise_multiplier**2 for release, count in plain)
    return Release(math.fsum(squares) ** -0.5, 1.0)


@lru_cache(maxsize=1024)
def _epsilon(spent: Frozen, delta: float, relation: Relation) -> float:
    if not spent:
        return 0.0
    if min(release.noise_multiplier for release, _ in spent) < LEAST_NOISE:
        return math.inf
    return _refined(spent, delta, relation)[0]


def _refined(spent: Frozen, delta: float, relation: Relation) -> tuple[float, float]:
    """(epsilon, the last grid that was asked)."""
    bounds = [(value, grid) for grid, value, _ in _bounds(spent, delta, relation)]
    return min(bounds)[0], bounds[-1][1]  # a finer grid may be a worse one: it is another bound


def _bounds(spent: Frozen, delta: float, relation: Relation) -> Iterator[tuple[float, float, float]]:
    """(grid, its bound of epsilon, how far that fell), until a finer grid would tell nothing more."""
    before = math.inf
    for grid in GRIDS:
        value = _on_grid(spent, delta, relation, grid)
        yield grid, value, before - value
        if value == 0 or (math.isinf(value) and grid <= USUAL_GRID):
            return
        if grid <= FINE * value and abs(before - value) <= STABLE * value:
            return
        before = value


@lru_cache(maxsize=4096)
def _on_grid(spent: Frozen, delta: float, relation: Relation, grid: float) -> float:
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(_neighbours(relation), grid)
    for release, count in spent:
        accountant.compose(_event(release), count)
    return _sane(accountant.get_epsilon(delta))


def _event(release: Release):  # type: ignore[no-untyped-def]
    from dp_accounting import dp_event

    event = dp_event.GaussianDpEvent(release.noise_multiplier * DISCRETE_PART)
    if release.sampling_rate == 1:
        return event
    return dp_event.PoissonSampledDpEvent(release.sampling_rate, event)


def _neighbours(relation: Relation):  # type: ignore[no-untyped-def]
    import dp_accounting

    if relation == "replace-one":
        return dp_accounting.NeighboringRelation.REPLACE_ONE
    return dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


def _sane(value: float) -> float:
    """The value if it is a number from 0 to `UNREACHABLE`; 0 for a negative one, else infinity."""
    value = float(value)
    if math.isnan(value) or value >= UNREACHABLE:
        return math.inf
    return max(value, 0.0)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")


def compose(*parts: Composition) -> Counter[Release]:
    """Releases of several ledgers on the same data, counted together."""
    total: Counter[Release] = Counter()
    for part in parts:
        total.update(part)
    return total
