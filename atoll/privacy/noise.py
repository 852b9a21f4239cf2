"""Discrete Gaussian noise on a grid, from the operating system's entropy or, in a simulation, from a seed.

Floats are denser near zero, and sampled noise reaches only some of them, so that plain floating-point noise
can reveal the value to which it was added (Mironov 2012, "On significance of the least significant bits for
differential privacy"). Here the value and the noise are both whole
multiples of one granularity, a power of two far below the noise's deviation. The noise is drawn as a
whole number, exactly and without floats (`discrete_gaussian`); its sum with the value is exact in
float64, and all that follows is post-processing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from atoll.errors import ConfigError
from atoll.privacy.discrete_gaussian import DiscreteGaussian

RandomBits = Callable[[int], NDArray[np.uint64]]
"""A source of randomness: count to as many fresh random 64-bit words, [count]."""

FINENESS = 28
"""The deviation is two to this power of grid steps, or up to twice as many."""

NUMBERS_AT_A_TIME = 1 << 20
"""How many numbers' noise is drawn before it is added: the same words are read in the same order."""


def entropy(count: int) -> NDArray[np.uint64]:
    """Random 64-bit words from the operating system's cryptographic generator, [count]."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def seeded(seed: int) -> RandomBits:
    """A source that a seed repeats (Philox, Salmon et al. 2011): for simulations only, it protects nobody."""
    source = np.random.Philox(key=seed)
    return lambda count: np.asarray(source.random_raw(count), dtype=np.uint64)


def uniform(random_bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each 64-bit word, from its upper 53 bits; same shape, float64."""
    numbers: NDArray[np.float64] = (random_bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


@dataclass(frozen=True)
class Lattice:
    """Discrete Gaussian noise of one deviation, for values that are rounded to its granularity.

    Rounding moves each number by at most half a granularity, so a vector of n numbers by at most
    `rounding(n)` in L2 norm; a sensitivity grows by at most twice that.
    """

    deviation: float
    random_bits: RandomBits

    def __post_init__(self) -> None:
        if not (math.isfinite(self.deviation) and self.deviation > 0):
            raise ValueError(f"deviation must be finite and > 0, got {self.deviation}")

    @property
    def granularity(self) -> float:
        """The grid step, a power of two, in units of the values."""
        return 2.0 ** (math.floor(math.log2(self.deviation)) - FINENESS)

    def rounding(self, numbers: int) -> float:
        """The largest L2 distance by which rounding moves a vector of `numbers` numbers."""
        return 0.5 * self.granularity * math.sqrt(numbers)

    @property
    def variance(self) -> Fraction:
        """The variance of the noise, in squared grid steps."""
        return (Fraction(self.deviation) / Fraction(self.granularity)) ** 2

    def whole_noise(self, count: int) -> NDArray[np.int64]:
        """Discrete Gaussian noise in grid steps, [count]."""
        return DiscreteGaussian(self.variance, self.random_bits).draw(count)

    def noise(self, count: int) -> NDArray[np.float64]:
        """Discrete Gaussian noise in units of the values, [count]; whole multiples of the granularity."""
        return self.whole_noise(count).astype(np.float64) * self.granularity

    def added(
        self, values: NDArray[np.float64], *, into: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """The values, rounded, with noise; the sum is exact where values stay below 2^24 deviations.

        It is a new array, or written into `into`, which may be `values` itself. Noise is drawn for some
        numbers at a time, so that a large model's takes no memory of its own.

        Raises:
            ValueError: `into` is not contiguous.
        """
        noisy = np.empty(values.shape) if into is None else into
        if not noisy.flags.c_contiguous:
            raise ValueError("into must be contiguous: noise would be added to a copy")
        np.divide(values, self.granularity, out=noisy)
        np.rint(noisy, out=noisy)
        noisy *= self.granularity
        flat = noisy.reshape(-1)
        for start in range(0, flat.size, NUMBERS_AT_A_TIME):
            block = flat[start : start + NUMBERS_AT_A_TIME]
            block += self.noise(block.size)
        return noisy


def lattice_for(
    noise_multiplier: float, sensitivity: float, numbers: int, random_bits: RandomBits
) -> Lattice:
    """The noise for a sum of `numbers` numbers, with `sensitivity` enlarged by what rounding adds.

    What is added can bring the deviation to the next power of two, where the grid is twice as coarse: then
    rounding on that grid counts.

    Raises:
        ConfigError: the noise is so much that rounding on its grid would add a quarter of it, or more.
    """
    most = 2.0 ** (FINENESS - 2) / math.sqrt(numbers)
    if noise_multiplier > most:
        raise ConfigError(
            f"privacy.noise_multiplier: {noise_multiplier:.6g} is too much for {numbers:,} numbers, whose"
            f" rounding must be covered too; expected at most {most:.6g}"
        )
    lattice = Lattice(noise_multiplier * sensitivity, random_bits)
    while True:
        before = lattice
        lattice = Lattice(noise_multiplier * (sensitivity + 2 * before.rounding(numbers)), random_bits)
        if lattice.granularity == before.granularity:
            return lattice
