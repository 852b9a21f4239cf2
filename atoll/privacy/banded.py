"""Noise that is correlated over rounds: banded matrix factorisation, also called DP-FTRL.

The rounds' clipped sums are the rows of x. Instead of x + Z, with Z independent from round to round,
the server releases C^-1 (C x + Z) = x + C^-1 Z. C is lower triangular, Toeplitz, with b bands, so that
the noise of a round takes back a part of the noise of the b - 1 rounds before it, and the model, which
follows the sum of all rounds, carries less. The coefficients are those of the square root of the matrix of
prefix sums, c_k = binom(2k, k) / 4^k, cut off after b (Fichtenberger, Henzinger and Upadhyay 2022,
"Constant Matters"; Kalinin and Lampert 2024, "Banded Square Root Matrix Factorization"), divided by
their norm: a whole column of C has norm 1, so that one participation costs what one release of the
Gaussian mechanism with the same noise multiplier costs. One band is the independent mechanism, bit for bit.

Sensitivity (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization"): each client takes
part at most once in any b rounds in a row. Then row t of C x holds one contribution of a client at
most, that of the last round s <= t it took part in, times c_(t-s). Given all that was released before,
row t is a Gaussian release of sensitivity c_(t-s) clipping norms: a bound that holds however
contributions depend on earlier models. The squares add up over the rows that were released, so that any
number of rounds has its own claim, also where a round was lost in a crash and released a second time.
The claim is of the participations allowed that cost most.

Exactness: C x, in float64, is rounded to the noise's grid, and the discrete noise added exactly; what is
released is computed from that sum and from earlier releases alone. It is post-processing of the noisy
sums, down to the last bit. Each row's rounding counts in the sensitivity (`CentralGaussian.lattice`).

The sums without noise are needed for b - 1 more rounds. Who reads them, or subtracts them from what was
released, knows the noise: they stay with the trusted server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from atoll.privacy.accounting import Release
from atoll.privacy.noise import Lattice

Vector = NDArray[np.float64]

LEAST_SQUARE = 1e-12
"""The least squared sensitivity that a round is charged, since a ledger has no free releases."""


@lru_cache(maxsize=64)
def coefficients(bands: int) -> tuple[float, ...]:
    """The first column of C: `bands` decreasing numbers with L2 norm 1.

    >>> coefficients(1)
    (1.0,)
    >>> [round(c / coefficients(4)[0], 4) for c in coefficients(4)]
    [1.0, 0.5, 0.375, 0.3125]

    Raises:
        ValueError: `bands` is below 1.
    """
    if bands < 1:
        raise ValueError(f"bands must be >= 1, got {bands}")
    column = [1.0]
    for k in range(1, bands):
        column.append(column[-1] * (2 * k - 1) / (2 * k))
    norm = math.sqrt(math.fsum(c * c for c in column))
    return tuple(c / norm for c in column)


def squared_sensitivity(releases: Mapping[int, int], bands: int) -> float:
    """The squared sensitivity of all released rows to one client, in units of the squared clipping norm.

    `releases` is how many times each round was released. The result is the maximum over all participations
    that are at least `bands` rounds apart.
    """
    rounds = max(releases, default=0)
    if _in_order(releases):
        return _of_rounds(rounds, bands)
    squares = np.square(coefficients(bands))
    counts = np.zeros(rounds + bands)
    for round, count in releases.items():
        counts[round] = count
    # What taking part in round s costs, from s = 0, which is none.
    gains = np.correlate(counts, squares, "valid").tolist()
    best = [0.0] * (rounds + bands + 1)
    for s in range(rounds, 0, -1):
        best[s] = max(best[s + 1], gains[s] + best[s + bands])
    return best[1]


def _in_order(releases: Mapping[int, int]) -> bool:
    """Whether these are the rounds 1, 2, ... without a gap, each released once."""
    return len(releases) == max(releases, default=0) and set(releases.values()) <= {1}


def _of_rounds(rounds: int, bands: int) -> float:
    """The squared sensitivity for rounds 1, 2, ..., `rounds`, each released once.

    Taking part in round 1 and then as often as allowed costs most: every participation costs 1 except the
    last, which the end of the run may cut off, and the coefficients decrease.
    """
    whole, rest = divmod(rounds, bands)
    return whole + math.fsum(c * c for c in coefficients(bands)[:rest])


def cost_of_round(releases: Mapping[int, int], round: int, noise_multiplier: float, bands: int) -> Release:
    """The cost of one more release of `round`, given how many times each round was released.

    For Gaussian releases without sampling, the squares of 1 / noise multiplier add up. All costs together
    therefore equal one release with the noise multiplier divided by the sensitivity.
    """
    if _in_order(releases) and round == len(releases) + 1:
        return Release(noise_multiplier / coefficients(bands)[(round - 1) % bands], 1.0)
    before = squared_sensitivity(releases, bands)
    after = squared_sensitivity({**releases, round: releases.get(round, 0) + 1}, bands)
    return Release(noise_multiplier / math.sqrt(max(after - before, LEAST_SQUARE)), 1.0)


def sensitivity_of(spent: Mapping[Release, int], noise_multiplier: float) -> float:
    """The sensitivity, in clipping norms, that the sum of a run's costs corresponds to."""
    squares = (count / release.noise_multiplier**2 for release, count in spent.items())
    return noise_multiplier * math.sqrt(math.fsum(squares))


@dataclass
class CorrelatedNoise:
    """The sums and releases of the last `bands` - 1 rounds, the latest first, from which noise is correlated.

    `sums` are clipped sums without noise, which must stay secret.
    """

    bands: int = 1
    sums: list[Vector] = field(default_factory=list)
    released: list[Vector] = field(default_factory=list)

    def release(self, total: Vector, lattice: Lattice) -> Vector:
        """The round's sum plus noise correlated with earlier rounds; both are stored for later rounds.

        With one band nothing is stored, and `total` itself is noised.
        """
        if self.bands == 1:
            return lattice.added(total, into=total)
        first, *later = coefficients(self.bands)
        combined, known = first * total, np.zeros_like(total)
        for c, earlier, public in zip(later, self.sums, self.released, strict=False):
            combined += c * earlier
            known += c * public
        released: Vector = (lattice.added(combined, into=combined) - known) / first
        self.sums = [total, *self.sums][: self.bands - 1]
        self.released = [released, *self.released][: self.bands - 1]
        return released.copy()
